"""Runs a Grain dataset ahead of its user, in threads or worker processes, and joins its parts into batches."""

import atexit
import gc
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, takewhile
from multiprocessing import resource_tracker
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grain
import numpy as np
from absl import flags

from mae_jax.data import workers as processes

Part = dict[str, np.ndarray]
B = TypeVar("B")

# Images in a part, at most. Workers hand over parts of a batch: the first batch comes sooner, shared memory stays
# small, and closing waits for the rest of a part, not of a batch of thousands.
_PART = 32

# Smaller arrays go through the pipe: a segment of shared memory costs more.
_SHARED_FROM = 2**16


def part_size(batch_size: int) -> int:
    """The largest divisor of `batch_size` that makes a part."""
    return max(size for size in range(1, min(batch_size, _PART) + 1) if batch_size % size == 0)


def join(parts: list[Part]) -> Part:
    """Parts to one batch, copied out of shared memory, which goes when they do."""
    return {key: np.concatenate([np.asarray(part[key]) for part in parts]) for key in parts[0]}


class Batches(Iterator[B], Generic[B]):
    """Batches in order, read ahead. Close it, or use it in a `with`: it holds threads, processes, shared memory.

    Reading starts at once, so that workers start while the model compiles.
    """

    def __init__(
        self,
        parts: grain.MapDataset,
        parts_per_batch: int,
        join: Callable[[list[Part]], B],
        *,
        workers: int,
        threads: int,
        part_bytes: int,
    ) -> None:
        """Read `parts`, each `part_bytes` large, in `workers` processes, or where that is 0 in `threads` threads.

        With 0 threads one thread reads, the one that also joins the batches.
        """
        processes.prepare_decoder()
        if workers:
            stream = _in_processes(parts, workers, math.ceil(parts_per_batch / workers), part_bytes)
        else:
            options = grain.ReadOptions(threads, max(threads, parts_per_batch) if threads else 0)
            stream = parts.to_iter_dataset(options)
        iterator = iter(stream)
        joiner, stopping = ThreadPoolExecutor(1, "join-batches"), threading.Event()

        def read() -> Future[B | None]:
            return joiner.submit(_read_batch, iterator, parts_per_batch, join, stopping)

        with processes.signals_kept_from_children():
            iterator.get_state()  # makes every worker's iterator, so that all start now and not each when it is due
            iterator.start_prefetch()
            self._batches = _one_ahead(read, read())
        # Also when this is dropped, and at exit, before multiprocessing ends what Grain needs to free shared memory.
        self._close = weakref.finalize(self, _end, self._batches, iterator, joiner, stopping, workers > 0)
        atexit.register(self._close)

    def __next__(self) -> B:
        """The next batch.

        Raises:
          StatedError: a worker process has ended by itself, or the dataset says so.
          StopIteration: there are no more, or this is closed.
        """
        try:
            return next(self._batches)
        except Exception as error:
            self.close()
            if (death := processes.death_of_worker(error)) is not None:
                raise death from error
            raise

    def close(self) -> None:
        """End the threads and processes; waits for what they are doing, a part each."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _one_ahead(read: Callable[[], Future[B | None]], coming: Future[B | None]) -> Generator[B, None, None]:
    while (batch := coming.result()) is not None:
        coming = read()
        yield batch


def _read_batch(
    iterator: Iterator[Part], parts_per_batch: int, join: Callable[[list[Part]], B], stopping: threading.Event
) -> B | None:
    """The next batch; None if there is none, or nobody wants it any more."""
    parts = list(takewhile(lambda part: not stopping.is_set(), islice(iterator, parts_per_batch)))
    return join(parts) if parts and not stopping.is_set() else None


def _end(
    batches: Generator, iterator: Any, joiner: ThreadPoolExecutor, stopping: threading.Event, shared_memory: bool
) -> None:
    stopping.set()
    joiner.shutdown(cancel_futures=True)  # first: a Grain iterator that is closed under its reader leaves it waiting
    iterator.close()
    batches.close()  # lets go of Grain's iterator, which would close itself again at exit, noisily
    if shared_memory:
        gc.collect()  # errors that ended Grain's threads, StopIteration among them, hold on to it in cycles
        _wait_until_freed()


def _wait_until_freed() -> None:
    """Grain frees shared memory in a thread of its own, in order: wait for the last piece, or exit may come first."""
    last = grain.multiprocessing.SharedMemoryArray((1,), np.uint8)
    last.unlink_on_del()
    path = os.path.join(processes.SHARED_MEMORY, last.metadata.name)
    del last
    deadline = time.monotonic() + 2
    while os.path.exists(path) and time.monotonic() < deadline:
        time.sleep(0.001)


def _in_processes(parts: grain.MapDataset, workers: int, ahead: int, part_bytes: int) -> grain.IterDataset:
    """Worker w reads parts w, w + workers ... and keeps `ahead` of them ready, and as many again wait here."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads its settings from flags, and no one else here uses them
    resource_tracker.ensure_running()  # started with the first worker it would unblock the signals that are blocked
    # Beside those that are ready: one that is made, and those that are joined.
    shared = processes.shared_memory_holds(part_bytes * workers * (3 * ahead + 1))
    options = grain.experimental.DatasetOptions(min_shm_size=_SHARED_FROM if shared else sys.maxsize)
    stream = parts.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    stream = grain.experimental.WithOptionsIterDataset(stream, options)
    return stream.mp_prefetch(grain.MultiprocessingOptions(workers, ahead), processes.initialize_worker)
