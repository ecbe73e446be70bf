"""Orbax's reads and writes that fail: the first is raised, and what fails beside it or after it is not reported."""

import contextlib
import gc
import logging
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import orbax.checkpoint as ocp


def release(error: BaseException | None) -> None:
    """Let go of the coroutines that the frames of an error hold; asyncio reports each when it is collected."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _of_no_concern(unraisable: "sys.UnraisableHookArgs") -> bool:
    """Whether it is of a read whose event loop is closed: TensorStore calls the loop, and drops what waited for it.

    What waited is a coroutine of Orbax, which turns even its own end (GeneratorExit) into an error.
    """
    waiting = getattr(unraisable.object, "cr_code", None)
    return str(unraisable.exc_value) == "Event loop is closed" or (
        waiting is not None and waiting.co_filename.startswith(str(Path(ocp.__file__).parent))
    )


@contextlib.contextmanager
def quiet_threads() -> Iterator[None]:
    """The first read or write that fails is raised, and nothing is said of those beside it.

    Orbax reads and writes with coroutines and threads: those that fail later are logged, or reported by asyncio when
    they are collected; those that end when the event loop is closed already by the interpreter, from other threads.
    """
    report, late = sys.unraisablehook, []

    def others(unraisable: "sys.UnraisableHookArgs") -> None:
        if _of_no_concern(unraisable):
            late.append(unraisable.exc_type)
        else:
            report(unraisable)

    loggers = {name: logging.getLogger(name) for name in ("asyncio", "absl")}
    levels = {name: logger.level for name, logger in loggers.items()}
    failed = False
    try:
        sys.unraisablehook = others
        for logger in loggers.values():
            logger.setLevel(logging.CRITICAL + 1)
        yield
    except Exception as error:
        failed = True
        release(error)
        raise
    finally:
        seen = -1 if failed else 0
        while seen < len(late):
            seen = len(late)
            time.sleep(0.3)
        gc.collect()
        sys.unraisablehook = report
        for name, logger in loggers.items():
            logger.setLevel(levels[name])


def silence_late_tasks() -> None:
    """Reads that failed beside another may be collected, and reported, only as the interpreter ends."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
