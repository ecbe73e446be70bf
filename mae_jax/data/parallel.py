"""A function over many things in several processes, results in order, no more of them ahead than needed.

Each process has a pipe of its own. Where processes share a queue, as in Python's own pools, one that is killed in the
middle of an answer leaves the queue locked and half a message in it, and everyone waits for ever.
"""

import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple, TypeVar, cast

from mae_jax.data import loader as workers
from mae_jax.errors import StatedError

T = TypeVar("T")
R = TypeVar("R")
_AHEAD = 3  # things a process, which are given out and not yet asked for
_IN_HAND = 2  # of them in a process's pipe: the one it is at, and the next


class DeadWorkerError(StatedError):
    """A process ended by itself, or was killed."""


class _Answer(NamedTuple):
    result: Any
    error: Exception | None


def ordered_map(function: Callable[[T], R], things: Iterable[T], processes: int) -> Generator[R, None, None]:
    """`function` of each thing, in order; in this process where `processes` is 0. Close the iterator, or use it up.

    Things are small, results need not be. Ctrl-C is this process's to answer; the others end with it, however it ends.

    Raises:
      DeadWorkerError: a process was killed.
      Exception: what the function raised, at the thing's turn.
    """
    if not processes:
        workers.prepare_decoder()
        yield from map(function, things)
        return
    pool = _Pool(function, processes)
    rest = iter(enumerate(things))
    early: dict[int, _Answer] = {}  # those that came before their turn
    try:
        given = turn = 0
        while True:
            while given - turn < _AHEAD * processes and pool.has_room():
                try:
                    pool.give(*next(rest))
                except StopIteration:
                    break
                given += 1
            if turn == given:
                return
            early |= pool.answers(waiting=turn not in early)
            if turn in early:
                result, error = early.pop(turn)
                turn += 1
                if error:
                    raise error
                yield result
    finally:
        pool.end()


class _Pool:
    """Processes, which start when there is something for them, and how much each has still to answer."""

    def __init__(self, function: Callable[[Any], Any], most: int):
        self.function = function
        self.most = most
        self.processes: dict[Connection, SpawnProcess] = {}
        self.in_hand: dict[Connection, int] = {}

    def has_room(self) -> bool:
        return len(self.processes) < self.most or min(self.in_hand.values()) < _IN_HAND

    def give(self, number: int, thing: object) -> None:
        """To a new process, or to the one that has the least to do."""
        pipe = min(self.in_hand, key=self.in_hand.__getitem__, default=None)
        if pipe is None or (self.in_hand[pipe] and len(self.processes) < self.most):
            pipe = self._start()
        try:
            pipe.send((number, thing))
        except OSError as error:
            raise _dead() from error
        self.in_hand[pipe] += 1

    def answers(self, waiting: bool) -> dict[int, _Answer]:
        """Those that have come, by number; one at least where this waits."""
        found = {}
        for ready in wait([pipe for pipe, count in self.in_hand.items() if count], None if waiting else 0):
            pipe = cast(Connection, ready)  # `wait` takes sockets and handles too
            try:
                message = pipe.recv_bytes()
            except (EOFError, OSError) as error:
                raise _dead() from error
            number, result, failure = pickle.loads(message)
            found[number] = _Answer(result, failure)
            self.in_hand[pipe] -= 1
        return found

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
        for pipe, process in self.processes.items():
            process.join()
            pipe.close()

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(self.function, there), daemon=True)
        resource_tracker.ensure_running()  # started with the first process it would unblock the signals
        with workers.signals_kept_from_children():
            process.start()
        there.close()  # so that the pipe ends with the process
        self.processes[here], self.in_hand[here] = process, 0
        return here


def _work(function: Callable[[Any], Any], pipe: Connection) -> None:
    workers.initialize_worker(0, 0)
    with suppress(EOFError, BrokenPipeError):  # the other process is gone
        while True:
            number, thing = pipe.recv()
            try:
                message = pickle.dumps((number, function(thing), None))
            except Exception as error:
                message = pickle.dumps((number, None, _portable(error)))
            pipe.send_bytes(message)


def _portable(error: Exception) -> Exception:
    """The error, with where it was raised; of one that does not survive pickling, what it says."""
    told = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In a worker process:\n{told}")
    return error


def _dead() -> DeadWorkerError:
    return DeadWorkerError("a worker process ended by itself or was killed. If memory ran out, use fewer --workers.")
