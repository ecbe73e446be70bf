"""A function over many things in several processes, results in order, no more of them ahead than needed."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from mae_jax.data import workers
from mae_jax.errors import StatedError

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(function: Callable[[T], R], things: Iterable[T], processes: int) -> Generator[R, None, None]:
    """`function` of each thing, in order; in this process where `processes` is 0. Close the iterator, or use it up.

    Ctrl-C is this process's to answer; the others end with it, however it ends.

    Raises:
      StatedError: a process was killed.
    """
    if not processes:
        workers.prepare_decoder()
        yield from map(function, things)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _initialize)
    rest = iter(things)
    ahead: deque[Future[R]] = deque()

    def submit(count: int) -> None:
        for thing in islice(rest, count):
            with workers.signals_kept_from_children():  # processes are started as they are first needed
                ahead.append(pool.submit(function, thing))

    try:
        submit(3 * processes)
        while ahead:
            result = ahead.popleft().result()
            submit(1)
            yield result
    except BrokenProcessPool as error:
        raise StatedError(
            "a worker process ended by itself or was killed. If memory ran out, use fewer --workers; "
            "the same command goes on where it stopped."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _initialize() -> None:
    workers.initialize_worker(0, 0)
    # Where one process was killed the pool ends the others by SIGTERM, and waits for them.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
