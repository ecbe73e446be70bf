"""A function that is called in worker processes: each thread that calls it has a process, behind a pipe of its own.

Own code, since a system that runs out of memory kills workers, and no pool that we know survives that at any moment:
in `concurrent.futures`, `multiprocessing.Pool` and Grain the reader keeps the writing end of the pipe of answers open,
so that half an answer leaves it waiting for ever. Here the pipe ends with the process.

A worker is a program of its own and not a copy of the caller's: a script needs no `if __name__ == "__main__"`, and
nothing of it runs twice. It has a session of its own, so that a terminal's Ctrl-C is its owner's alone, ignores what
clusters send to all processes of a job, and ends when its owner does, since the pipe ends then.
"""

import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import cloudpickle

from mae_jax.data.images.decode import prepare_decoder
from mae_jax.errors import StatedError

T = TypeVar("T")
R = TypeVar("R")

# What it ignores comes first: its imports take a third of a second.
_PROGRAM = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, signal.SIG_IGN)
sys.path[:] = {path!r}
from mae_jax.data.workers import work
work({handle})
"""


class DeadWorkerError(StatedError):
    """A worker process ended by itself, or was killed."""


class WorkerProcesses(Generic[T, R]):
    """`function`, called in worker processes: as many as threads call, each started by its thread's first call."""

    def __init__(self, function: Callable[[T], R]) -> None:
        self._function = cloudpickle.dumps(function)  # also of a class or function in a script or notebook
        self._own = threading.local()
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._ended = False

    def __call__(self, thing: T) -> R:
        """Return `function(thing)`.

        Raises:
          DeadWorkerError: the process was killed, or ended by itself.
          Exception: what the function raised, with a note of where.
        """
        if not hasattr(self._own, "worker"):
            with self._lock:
                if self._ended:
                    raise DeadWorkerError("the worker processes have ended")
                self._own.worker = _Worker(self._function)
                self._workers.append(self._own.worker)
        return self._own.worker.call(thing)

    def end(self) -> None:
        """Kill the processes; calls that are under way raise."""
        with self._lock:
            self._ended = True
        for worker in self._workers:
            worker.end()


class _Worker:
    """One process, and this end of its pipe."""

    def __init__(self, function: bytes) -> None:
        self._pipe, there = Pipe()
        with there:  # closed here once the process has it, so that the pipe ends with the process
            program = _PROGRAM.format(path=sys.path, handle=there.fileno())
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.DEVNULL,
                pass_fds=[there.fileno()],
                start_new_session=True,
            )
        self._function: bytes | None = function

    def call(self, thing: Any) -> Any:
        try:
            if self._function is not None:
                self._pipe.send_bytes(self._function)
                self._function = None
            self._pipe.send_bytes(pickle.dumps(thing))
            count = pickle.loads(self._pipe.recv_bytes())
            answer, *buffers = [self._pipe.recv_bytes() for _ in range(count)]
        except (EOFError, OSError) as error:
            raise self._death() from error
        result, failure = pickle.loads(answer, buffers=buffers)
        if failure is not None:
            raise failure
        return result

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _death(self) -> DeadWorkerError:
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended by itself with exit code {code}"
        return DeadWorkerError(
            f"a worker process {how}. If memory ran out, use fewer --workers; then run the same command again.",
            field="workers",
        )


def work(handle: int) -> None:
    """Answer what comes through a pipe until it ends: first a pickled function, then things to call it with."""
    pipe = Connection(handle)
    prepare_decoder()
    with suppress(EOFError, OSError):  # the owner is gone
        function = _load(pipe.recv_bytes())
        while True:
            answer = _answer(function, pickle.loads(pipe.recv_bytes()))
            for part in (pickle.dumps(len(answer)), *answer):
                pipe.send_bytes(part)


def _load(pickled: bytes) -> Callable[[Any], Any]:
    """Unpickle a function; where that fails, every call raises why."""
    try:
        return pickle.loads(pickled)
    except Exception as error:
        failure = _portable(error)

        def fail(thing: Any) -> Any:
            raise failure

        return fail


def _answer(function: Callable[[Any], Any], thing: Any) -> list[Any]:
    """Pickle a result, or what was raised; arrays follow as they are, which saves two copies of each."""
    arrays: list[pickle.PickleBuffer] = []
    try:
        result = pickle.dumps((function(thing), None), protocol=5, buffer_callback=arrays.append)
    except Exception as error:
        return [pickle.dumps((None, _portable(error)))]
    return [result, *[array.raw() for array in arrays]]


def _portable(error: Exception) -> Exception:
    """Return the error, with a note of where it was raised; of one that does not survive pickling, its message."""
    where = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In a worker process:\n{where}")
    return error
