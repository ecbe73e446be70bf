"""Runs a Grain dataset ahead of its user, in threads or worker processes, and joins its parts into batches."""

import atexit
import ctypes
import gc
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice, takewhile
from multiprocessing import resource_tracker
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import cv2
import grain
import numpy as np
from absl import flags
from PIL import Image

from mae_jax.errors import StatedError

_MOST = 16  # of the default, for a machine with many cores and other users
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3), from malloc.h
SHARED_MEMORY = "/dev/shm"


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_readers(in_memory: bool) -> int:
    """Worker processes, or threads in their place: none for a source in memory, else one a core up to 16.

    Threads are no bad choice: Pillow lets others run while it decodes and resizes.
    """
    return 0 if in_memory else min(available_cores(), _MOST)


def prepare_decoder() -> None:
    """Pillow's settings for reading many files, for this process.

    It keeps up to 8 blocks of freed image memory (of 16 MB at most) instead of none: page faults on fresh memory cost
    up to half of a JPEG's decoding. Its warnings about odd files, such as damaged EXIF, are off: a file that decodes
    is no news.
    """
    Image.core.set_blocks_max(8)
    cv2.setNumThreads(0)  # its threads would take turns with those that read
    _reuse_freed_memory()
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _reuse_freed_memory() -> None:
    """Let glibc keep blocks of up to 32 MB (its limit) that are freed, as parts of a batch are all the time.

    By default it maps each anew, and the system clears its pages: for pixels that are only copied, half of the time.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, 2**27)


def initialize_worker(index: int, count: int) -> None:
    """Runs first in each worker process."""
    del index, count
    prepare_decoder()
    # Leave at once when the work is done: taking Python and what Grain has imported apart takes half a second. Never
    # with code 0, which Grain would not see as an end that nobody asked for.
    atexit.register(os._exit, 1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def signals_kept_from_children() -> Iterator[None]:
    """Threads and processes that are started here, and what they start, never see SIGINT or SIGTERM.

    They inherit the blocked mask. A handler set in the worker would come too late: Ctrl-C during its imports, which
    take a second, would print a traceback for each worker.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def shared_memory_holds(size: int) -> bool:
    """Whether `size` bytes fit into shared memory; containers often have 64 MB, and running over kills a worker."""
    return not os.path.isdir(SHARED_MEMORY) or size < shutil.disk_usage(SHARED_MEMORY).free


def death_of_worker(error: Exception) -> StatedError | None:
    """What to tell the user when `error` is Grain's report of a worker that ended by itself."""
    match = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
    if match is None:
        return None
    code = int(match[1])
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return StatedError(
        f"a worker process that reads images {how}. If memory ran out, use fewer workers; "
        "the same command continues from the last checkpoint."
    )


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
        prepare_decoder()
        if workers:
            stream = _in_processes(parts, workers, math.ceil(parts_per_batch / workers), part_bytes)
        else:
            options = grain.ReadOptions(threads, max(threads, parts_per_batch) if threads else 0)
            stream = parts.to_iter_dataset(options)
        iterator = iter(stream)
        joiner, stopping = ThreadPoolExecutor(1, "join-batches"), threading.Event()

        def read() -> Future[B | None]:
            return joiner.submit(_read_batch, iterator, parts_per_batch, join, stopping)

        with signals_kept_from_children():
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
            if (death := death_of_worker(error)) is not None:
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
    path = os.path.join(SHARED_MEMORY, last.metadata.name)
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
    shared = shared_memory_holds(part_bytes * workers * (3 * ahead + 1))
    options = grain.experimental.DatasetOptions(min_shm_size=_SHARED_FROM if shared else sys.maxsize)
    stream = parts.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    stream = grain.experimental.WithOptionsIterDataset(stream, options)
    return stream.mp_prefetch(grain.MultiprocessingOptions(workers, ahead), initialize_worker)
