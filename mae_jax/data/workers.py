"""Worker processes that read images: how many, how they start, and how they end.

Grain starts them; what it leaves open is closed here. They ignore the terminal's Ctrl-C and a SIGTERM to the process
group, which are the main process's to answer, and they leave when it is gone, however it went.
"""

import atexit
import ctypes
import multiprocessing
import os
import platform
import re
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
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
