"""Reads ahead, in order, in threads or worker processes, and joins what was read into batches.

Threads are no bad choice: decoding, resizing and encoding let others run. Beyond a few cores Python's own part of each
image, which does not, is what worker processes are for.
"""

import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import numpy as np

T = TypeVar("T")
R = TypeVar("R")
B = TypeVar("B")

_MOST_READERS = 16  # of the default, for a machine with many cores and other users
_AHEAD = 3  # things a reader that are given out and not yet asked for, at least

Part = dict[str, np.ndarray]

# Images in a part, at most. What is handed from one thread or process to another costs as much as a small crop: many at
# once; but the first batch should come soon, and closing waits for the rest of a part.
_PART = 32


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_readers(in_memory: bool) -> int:
    """Return how many read by default: none for a source in memory, else one a core up to 16."""
    return 0 if in_memory else min(available_cores(), _MOST_READERS)


class _Closed:
    """What closes itself at the end of a `with`; contextlib.closing only wraps what something else has made."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class OrderedMap(_Closed, Iterator[R], Generic[T, R]):
    """`function` of each thing, in order, computed ahead. Close it, use it up, or use it in a `with`."""

    def __init__(
        self, function: Callable[[T], R], things: Iterable[T], *, workers: int, threads: int, ahead: int = 0
    ) -> None:
        """Compute in `workers` processes, or where that is 0 in `threads` threads; with neither, when asked.

        `ahead` things are computed before they are asked for, and no fewer than keep all busy.
        """
        readers = workers or threads
        self._things = iter(things)
        self._call: Callable[[T], R] = function
        self._ahead = max(ahead, _AHEAD * readers)
        self._coming: deque[Future[R]] = deque()
        self._executor = ThreadPoolExecutor(readers, "read-images") if readers else None
        end_workers = None
        if workers:
            from mae_jax.data.workers import WorkerProcesses  # noqa: PLC0415 - only where there are some

            self._call = processes = WorkerProcesses(function)
            end_workers = processes.end
        # `end` stops the work without waiting for it: also when this is dropped, and at exit.
        self.end = weakref.finalize(self, _end, self._executor, end_workers)

    def __next__(self) -> R:
        """Return the next result.

        Raises:
          DeadWorkerError: a worker process was killed.
          Exception: what the function raised, at the thing's turn.
          StopIteration: there are no more, or this is closed.
        """
        if not self.end.alive:
            raise StopIteration
        if self._executor is None:
            return self._call(next(self._things))
        for thing in islice(self._things, self._ahead - len(self._coming)):
            self._coming.append(self._executor.submit(self._call, thing))
        try:
            if self._coming:
                return self._coming.popleft().result()
        except BaseException:
            self.close()
            raise
        self.close()
        raise StopIteration

    def close(self) -> None:
        """End the threads and processes; waits for what the threads are doing, a thing each."""
        self.end()
        if self._executor is not None:
            self._executor.shutdown()


def _end(executor: ThreadPoolExecutor | None, end_workers: Callable[[], None] | None) -> None:
    if executor is not None:
        executor.shutdown(wait=False, cancel_futures=True)
    if end_workers is not None:
        end_workers()


def _end_batches(end_parts: Callable[[], object], joiner: ThreadPoolExecutor) -> None:
    joiner.shutdown(wait=False, cancel_futures=True)
    end_parts()


class Batches(_Closed, Iterator[B], Generic[B]):
    """Batches in order, read ahead. Close it, or use it in a `with`: it holds threads, processes and memory.

    Reading starts at once, so that workers start while the model compiles.
    """

    def __init__(self, parts: OrderedMap[Any, Part], parts_per_batch: int, join: Callable[[list[Part]], B]) -> None:
        joiner = ThreadPoolExecutor(1, "join-batches")

        def read() -> B | None:
            found = list(islice(parts, parts_per_batch))
            return join(found) if found else None

        self._next: Callable[[], Future[B | None]] = lambda: joiner.submit(read)
        self._coming = self._next()  # one batch is joined while the one before it is used
        self._parts, self._joiner = parts, joiner
        self._end = weakref.finalize(self, _end_batches, parts.end, joiner)

    def __next__(self) -> B:
        """Return the next batch.

        Raises:
          StatedError: a worker process was killed, or the images cannot be read.
          StopIteration: there are no more, or this is closed.
        """
        if not self._end.alive:
            raise StopIteration
        try:
            batch = self._coming.result()
        except BaseException:
            self.close()
            raise
        if batch is None:
            self.close()
            raise StopIteration
        self._coming = self._next()
        return batch

    def close(self) -> None:
        """End the threads and processes; waits for what the threads are doing, a part each."""
        self._end()
        self._parts.close()
        self._joiner.shutdown()


def part_size(batch_size: int) -> int:
    """Return the largest divisor of `batch_size` that makes a part."""
    return max(size for size in range(1, min(batch_size, _PART) + 1) if batch_size % size == 0)


def join(parts: list[Part]) -> Part:
    """Copy parts into one batch."""
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
