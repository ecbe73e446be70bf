"""No host waits for one that is gone: each tells the others that it lives, and ends when one of them does not.

Without this a survivor hangs in its next collective, or is aborted by JAX with no word on what to do.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

HEARTBEAT = 2.0  # seconds
GONE_AFTER = 30  # seconds without a heartbeat

ALIVE, FAILED = "alive", "failed"

_SIGNAL_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


def end(message: str) -> NoReturn:
    """End this process with a sentence, and without waiting for anyone."""
    print(f"mae-jax: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def on_abort(act: Callable[[], NoReturn]) -> None:
    """Call `act` in place of dying of SIGABRT.

    JAX aborts the process where its coordination service cannot be reached, from C++ and with no hook: the callback
    that it has cannot be written in Python, and Python's own handlers would run too late.
    """
    handler = _SIGNAL_HANDLER(lambda number: act())
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(handler))  # for good: the abort may come at any time
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)


class Watch:
    """A thread that beats and listens, through the key-value store of JAX's coordination service.

    The store lives in host 0; when that is gone JAX aborts this process as soon as the connection breaks.
    """

    def __init__(self, index: int, count: int, store: Any) -> None:
        self.index, self.count = index, count
        self.how: Callable[[], str] = lambda: "Run the same command again."
        self._store = store
        self._heard = dict.fromkeys(range(count), ("", time.monotonic()))  # the newest beat of each, and when it came
        self._beats = dict.fromkeys(range(count), 0)  # heard so far
        self._over = threading.Event()
        self._ending = threading.Lock()
        on_abort(self._lost)
        self._thread = threading.Thread(target=self._listen, name="watch-hosts", daemon=True)
        self._thread.start()

    def fail(self, reason: str) -> None:
        """Tell the others that this host ends, and why; host 0 stays until they have heard."""
        try:
            self._store.key_value_set(f"{FAILED}/{self.index}", reason)
            if self.index == 0:
                time.sleep(3 * HEARTBEAT)
        except Exception as error:  # whatever the store says: this process ends with a better reason
            print(f"the other hosts could not be told: {error}", file=sys.stderr)

    def let_the_gone_be_named(self) -> None:
        """Return if all hosts live; else this process ends here. To be called with an error of any kind at hand.

        When a host dies, the others see whatever they were at fail first: a step, or a save with its barriers. One
        that is heard three times from now on lives: the first may have been read before, the second be as old as that,
        the third is younger than this call.
        """
        heard = dict(self._beats)
        while any(self._beats[host] - heard[host] < 3 for host in heard):
            time.sleep(HEARTBEAT / 4)

    def give_up(self, reason: str) -> NoReturn:
        """End this process and all others, from any thread; where one is gone already, that is the reason."""
        self.let_the_gone_be_named()
        self.stop()
        self.fail(reason)
        self._end(reason)

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join()

    def _listen(self) -> None:
        beat = 0
        while not self._over.wait(HEARTBEAT):
            beat += 1
            try:
                self._store.key_value_set(f"{ALIVE}/{self.index}", str(beat), allow_overwrite=True)
                alive, failed = (self._read(topic) for topic in (ALIVE, FAILED))
            except Exception:  # whatever its layers raise: the service is where host 0 is
                self._lost()
            for host, reason in failed.items():
                self._end(f"host {host} of {self.count} has failed: {reason}\n{self.how()}")
            now = time.monotonic()
            for host, value in alive.items():
                if self._heard[host][0] != value:
                    self._heard[host] = value, now
                    self._beats[host] += 1
            gone = [host for host, (_, when) in self._heard.items() if now - when > GONE_AFTER]
            if gone:
                names = " and ".join(f"host {host}" for host in gone)
                verb = "has" if len(gone) == 1 else "have"
                self._end(f"{names} of {self.count} {verb} not been heard of for {GONE_AFTER} s. {self.how()}")

    def _read(self, topic: str) -> dict[int, str]:
        return {int(key.rpartition("/")[2]): value for key, value in self._store.key_value_dir_get(f"{topic}/")}

    def _lost(self) -> NoReturn:
        self._end(f"the connection to host 0 of {self.count} is lost: it has ended or cannot be reached. {self.how()}")

    def _end(self, message: str) -> NoReturn:
        self._ending.acquire()  # never released: the first reason is the one
        end(message)
