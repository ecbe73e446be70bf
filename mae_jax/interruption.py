"""Ctrl-C and SIGTERM as exceptions that do not get lost."""

import gc
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

STOPPED = 128 + signal.SIGTERM  # exit code
AGAIN = 0.05  # seconds until a signal that could not be raised is sent once more


def end_by_exception(*numbers: signal.Signals) -> None:
    """Let SIGINT raise KeyboardInterrupt and SIGTERM SystemExit with code STOPPED, so that what is half done is undone.

    Python drops an exception that is raised in what the garbage collector calls, and JAX has it call a function each
    time. A signal that arrives there is sent again a little later. Outside the main thread nothing is set.
    """
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    if _is_dropped_in(frame):
        again = threading.Timer(AGAIN, signal.pthread_kill, (threading.main_thread().ident, number))
        again.daemon = True
        again.start()
        return
    _raise(number)


def _raise(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(STOPPED)


def _is_dropped_in(frame: FrameType | None) -> bool:
    """Whether an exception raised in this frame would get no further than one of its callers."""
    called = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        if frame.f_code in called or frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False
