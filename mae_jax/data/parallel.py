"""A function over many things in several processes, results in order, no more of them ahead than needed.

Each process has a pipe of its own. Where processes share a queue, as in Python's own pools, one that is killed in the
middle of an answer leaves the queue locked and half a message in it, and everyone waits for ever.
"""

import multiprocessing
import traceback
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from mae_jax.data import workers
from mae_jax.errors import StatedError

T = TypeVar("T")
R = TypeVar("R")
_AHEAD = 3  # things a process, which are given out and not yet asked for


def ordered_map(function: Callable[[T], R], things: Iterable[T], processes: int) -> Generator[R, None, None]:
    """`function` of each thing, in order; in this process where `processes` is 0. Close the iterator, or use it up.

    Things are small, results need not be. Ctrl-C is this process's to answer; the others end with it, however it ends.

    Raises:
      StatedError: a process was killed.
      Exception: what the function raised, at the thing's turn.
    """
    if not processes:
        workers.prepare_decoder()
        yield from map(function, things)
        return
    pool = _Pool(function, processes)
    rest = enumerate(things)
    early: dict[int, _Answer] = {}  # those that came before their turn
    try:
        given = turn = 0
        while True:
            for number, thing in islice(rest, _AHEAD * processes - (given - turn)):
                pool.give(number, thing)
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


_Answer = tuple[Any, Exception | None]


class _Pool:
    """Processes, which start when there is something for them, and what each has still to answer."""

    def __init__(self, function: Callable[[Any], Any], most: int):
        self.function = function
        self.most = most
        self.processes: dict[Connection, SpawnProcess] = {}
        self.waiting: dict[Connection, int] = {}

    def give(self, number: int, thing: object) -> None:
        """To a new process, or to the one that has the least to do."""
        pipe = min(self.waiting, key=self.waiting.__getitem__, default=None)
        if pipe is None or (self.waiting[pipe] and len(self.processes) < self.most):
            pipe = self._start()
        try:
            pipe.send((number, thing))
        except OSError as error:
            raise _ended() from error
        self.waiting[pipe] += 1

    def answers(self, waiting: bool) -> dict[int, _Answer]:
        """Those that have come, by number; one at least where this waits."""
        found = {}
        for pipe in wait([pipe for pipe, count in self.waiting.items() if count], None if waiting else 0):
            assert isinstance(pipe, Connection)
            try:
                number, result, error = pipe.recv()
            except (EOFError, OSError) as broken:
                raise _ended() from broken
            found[number] = (result, error)
            self.waiting[pipe] -= 1
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
        with workers.signals_kept_from_children():
            process.start()
        there.close()  # so that the pipe ends with the process
        self.processes[here], self.waiting[here] = process, 0
        return here


def _work(function: Callable[[Any], Any], pipe: Connection) -> None:
    workers.initialize_worker(0, 0)
    with suppress(EOFError, BrokenPipeError):  # the other process is gone
        while True:
            number, thing = pipe.recv()
            result, failure = None, None
            try:
                result = function(thing)
            except Exception as error:
                error.add_note(f"In a worker process:\n{traceback.format_exc()}")
                failure = error
            pipe.send((number, result, failure))


def _ended() -> StatedError:
    return StatedError(
        "a worker process ended by itself or was killed. If memory ran out, use fewer --workers; "
        "the same command goes on where it stopped."
    )
