"""Several hosts as one run, through jax.distributed: who takes part, what they tell each other, how they part.

A host is one process of JAX: one on each machine, or one for each GPU where Slurm starts them so. Host 0 coordinates.
"""

import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from orbax.checkpoint import multihost

from mae_jax.config import Run
from mae_jax.errors import StatedError

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


START_WITHIN = 100  # seconds for all hosts to come
TELL_WITHIN = 600  # seconds for a host to reach the same place; the watch ends the wait for one that is gone


@dataclasses.dataclass(frozen=True)
class Hosts:
    """This host among those of the run; by default it is alone.

    watch: what ends this process when another is gone, which none may wait for.
    """

    index: int = 0
    count: int = 1
    watch: Watch | None = None

    @property
    def first(self) -> bool:
        """Whether this host writes what one alone writes."""
        return self.index == 0

    def gather(self, topic: str, text: str) -> list[str]:
        """What each host says to `topic`, in the order of hosts. All must call it, and a topic can be used once."""
        if self.count == 1:
            return [text]
        store = multihost.get_jax_distributed_client()
        store.key_value_set(f"{topic}/{self.index}", text)
        return [store.blocking_key_value_get(f"{topic}/{host}", TELL_WITHIN * 1000) for host in range(self.count)]

    def explain(self, how: Callable[[], str]) -> None:
        """Say how the run can be continued, for the time when another host is gone."""
        if self.watch is not None:
            self.watch.how = how


def _cluster() -> bool:
    """Whether JAX may find other hosts by itself: in a step of a Slurm job with several tasks, or on a TPU."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 or importlib.util.find_spec("libtpu") is not None


def _start(config: Run) -> bool:
    """Meet the other hosts, as the configuration or the cluster says; False where there are none."""
    if config.num_processes == 1:
        return False
    meet = functools.partial(
        jax.distributed.initialize,
        initialization_timeout=START_WITHIN,
        heartbeat_timeout_seconds=3 * GONE_AFTER,  # the watch is to be first: it can tell who is gone
        shutdown_timeout_seconds=GONE_AFTER,
    )
    where = f"to coordinator {config.coordinator}" if config.coordinator else "together"
    failure = (
        f"the hosts did not come {where} within {START_WITHIN} s. Check that all were started, with the same "
        "--coordinator and --num-processes and each with its own --process-id, and that the port is free and open."
    )
    if config.num_processes is None and not _cluster():
        return False
    on_abort(lambda: end(failure))
    try:
        meet(config.coordinator, config.num_processes, config.process_id)
    except ValueError:
        if config.num_processes is not None:
            raise
        return False  # libtpu without a TPU
    except RuntimeError as error:
        raise StatedError(f"{failure} ({str(error).splitlines()[0]})") from error
    return jax.process_count() > 1


@contextlib.contextmanager
def joined(config: Run) -> Iterator[Hosts]:
    """The hosts of a run, from when all have come until all have done.

    One that fails tells the others, and must then leave without waiting for them (`os._exit`).

    Raises:
      StatedError: not all hosts came.
    """
    if not _start(config):
        yield Hosts()
        return
    count = jax.process_count()
    watch = Watch(jax.process_index(), count, multihost.get_jax_distributed_client())
    hosts = Hosts(jax.process_index(), count, watch)
    try:
        yield hosts
        hosts.gather("done", "")
    except StatedError as error:
        watch.stop()
        watch.fail(str(error))
        raise
    except Exception as error:
        watch.let_the_gone_be_named()
        watch.stop()
        watch.fail(f"{type(error).__name__}: {error}")
        raise
    watch.stop()
    jax.distributed.shutdown()
