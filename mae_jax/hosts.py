"""Several hosts as one run, through jax.distributed: what they exchange, and how they part (joining.py: how they meet).

A host is one process of JAX: one for each machine, or one for each GPU where the launcher starts them so. Host 0
coordinates: it holds the service that the others join through, and its key-value store.

How JAX behaves (0.10, on CPUs), and what follows from it here:

- Every host sends heartbeats from a C++ thread, so that one that compiles or is stopped for a minute stays; after
  `joining.HEARTBEAT` seconds without them the service takes it for gone.
- When host 0 is gone, or the service takes another for gone, JAX ends the process by SIGABRT (exit code 134) with a
  C++ stack; Python is not asked. Where a connection between two hosts breaks first, the step raises at once, and
  `joined` makes a sentence of it.
- SIGTERM is caught by JAX's preemption service after `initialize`, in C++ (`runs/stop.py`).
- A host that leaves by an exception waits for the others at the exit barrier, and they for it in a step: it must end
  by `os._exit`.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import jax

from mae_jax.config import Run
from mae_jax.errors import StatedError

GATHER_WITHIN = 600  # seconds for all hosts to come to the same `gather`
LINGER = 1.5  # seconds that a host 0 that fails keeps its store up, for the others to read why

# Each variable that can make a process one of several, or stop one that cannot join; launchers.py reads them.
SIGNS = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "PMI_RANK",
    "PMIX_RANK",
    "SLURM_STEP_NUM_TASKS",
)

# How an error of a collective operation begins, whichever library raised it: a status of absl.
STATUS = re.compile("(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")


@dataclasses.dataclass(frozen=True)
class Hosts:
    """This host among those of the run; by default it is alone."""

    index: int = 0
    count: int = 1
    _rounds: Iterator[int] = dataclasses.field(default_factory=itertools.count, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Return whether this host writes what one alone writes."""
        return self.index == 0

    def gather(self, topic: str, text: str) -> list[str]:
        """Return what each host gives to `topic`, in the order of hosts; all must call it, and in the same order.

        Raises:
          StatedError: another host has failed, or does not come.
        """
        if self.count == 1:
            return [text]
        number, store = next(self._rounds), _store()
        store.key_value_set(f"gather/{number}/{self.index}", text)
        texts = [self._wait_for(f"gather/{number}/{host}", host, topic) for host in range(self.count)]
        # All have come here, so that none still reads what was gathered before.
        store.key_value_delete(f"gather/{number - 1}/{self.index}")
        return texts

    def _wait_for(self, key: str, host: int, topic: str) -> str:
        until = time.monotonic() + GATHER_WITHIN
        while time.monotonic() < until:
            try:
                return str(_store().blocking_key_value_get(key, 500))  # milliseconds
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            if failures := self.failures():
                raise StatedError("\n".join(failures))
        raise StatedError(f"host {host} of {self.count} has not come to {topic!r} within {GATHER_WITHIN} s")

    def failures(self) -> list[str]:
        """Return a sentence for each other host that has left word why it fails."""
        found = {int(key.rpartition("/")[2]): reason for key, reason in _store().key_value_dir_get("failed/")}
        return [
            f"host {host} of {self.count} has failed: {reason}"
            for host, reason in sorted(found.items())
            if host != self.index
        ]

    def leave_word(self, reason: str) -> None:
        """Let the other hosts read why this one fails; it must end by `os._exit` then, without waiting for them."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # host 0 is gone, and there is nobody to read it
            if not self.failures():  # else the first reason stands, of which this one follows
                _store().key_value_set(f"failed/{self.index}", reason, allow_overwrite=True)
            if self.first:
                time.sleep(LINGER)


ALONE = Hosts()


def _store() -> Any:
    # There is no public name for it; Orbax and Flax take it in the same way.
    from jax._src import distributed  # noqa: PLC0415

    return distributed.global_state.client


@contextlib.contextmanager
def joined(config: Run) -> Iterator[Hosts]:
    """Give the hosts of a run, from when all have come until all have done.

    One that fails leaves word to the others; it must then end by `os._exit`, without waiting for them.

    Raises:
      StatedError: this is one of several and cannot join, a host has not come, has failed or is gone, or JAX finds no
        device.
    """
    several = False
    if _may_be_several(config):
        from mae_jax.joining import join  # noqa: PLC0415 - nothing of it concerns a process that is alone

        several = join(config)
    check_platform()
    if not several:
        yield ALONE
        return
    hosts = Hosts(jax.process_index(), jax.process_count())
    try:
        yield hosts
        hosts.gather("the end", "")
    except BaseException as error:
        reason = _explain(error, hosts, config)
        hosts.leave_word(reason)
        if isinstance(error, StatedError) or not isinstance(error, Exception):
            raise
        raise StatedError(reason) from error
    jax.distributed.shutdown()


def _may_be_several(config: Run) -> bool:
    """Return whether the flags, the environment or a TPU's library can make this process one of several."""
    if config.num_processes is not None:
        return config.num_processes > 1
    return importlib.util.find_spec("libtpu") is not None or any(os.environ.get(name) for name in SIGNS)


def collective_failure(error: BaseException) -> BaseException | None:
    """Return the failure of an operation of all hosts that an error is or comes of, if there is one.

    What raises it differs (JAX, in a step; Orbax, around one in a save), its words do not. TensorStore's have the same
    form, and where a disk is at fault the system's error number.
    """
    cause: BaseException | None = error
    while cause is not None and not (STATUS.match(str(cause)) and "os_error_code" not in str(cause)):
        cause = cause.__cause__ or cause.__context__
    return cause if isinstance(cause, Exception) else None


def _explain(error: BaseException, hosts: Hosts, config: Run) -> str:
    """Say why this host fails: because of another, if one has left word or a collective operation has failed."""
    first = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
    if isinstance(error, StatedError):
        return str(error)
    failures: list[str] = []
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        failures = hosts.failures()
    again = (
        f"Run the same command again: it continues from the newest checkpoint in {config.workdir}, on fewer hosts if "
        f"need be, as long as batch_size {config.batch_size} divides by devices x accumulate {config.accumulate}."
    )
    if failures:
        return "\n".join([*failures, again])
    if collective_failure(error) is not None:
        return f"an operation of all {hosts.count} hosts has failed, as it does when one is gone ({first}). {again}"
    return first


def check_platform() -> None:
    """Refuse platforms that JAX is asked for and does not find.

    Raises:
      StatedError: JAX_PLATFORMS names them.
    """
    try:
        jax.local_devices()
    except Exception as error:
        platforms = jax.config.values["jax_platforms"]
        if not platforms:
            raise
        raise StatedError(
            f"JAX_PLATFORMS is {platforms}, and JAX finds no such device ({str(error) or 'it gives no reason'}): unset "
            "it, or see whether the driver and the plugin for it are installed",
            field="JAX_PLATFORMS",
        ) from error
