"""Several hosts as one run, through jax.distributed: who takes part, what they tell each other, how they part.

A host is one process of JAX: one on each machine, or one for each GPU where Slurm starts them so. Host 0 coordinates.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator

import jax
from orbax.checkpoint import multihost

from mae_jax.config import RunConfig
from mae_jax.errors import StatedError
from mae_jax.train.liveness import GONE_AFTER, Watch, end, on_abort

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


def _start(config: RunConfig) -> bool:
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
def joined(config: RunConfig) -> Iterator[Hosts]:
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
