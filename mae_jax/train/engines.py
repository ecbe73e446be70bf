"""How a pure step is compiled and spread over devices.

`pmap`: data parallel over local devices. The state stays a plain pytree, the same on every device; batches are cut
along their first axis; gradients are averaged inside the step over AXIS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mae_jax.errors import StatedError
from mae_jax.train.steps import Batch, Metrics, TrainState

AXIS = "data"

Tree = TypeVar("Tree")


def choose_devices(count: int | None) -> list[jax.Device]:
    """The first `count` local devices, or all.

    Raises:
      StatedError: there are fewer.
    """
    found = jax.local_devices()
    if count is not None and count > len(found):
        raise StatedError(f"devices {count} asked for, this host has {len(found)} ({found[0].platform})")
    return found[:count]


@dataclass(frozen=True)
class PmapEngine:
    """A compiled step over `devices`.

    in_flight: how many steps the host may run ahead of the device. Batches wait in device memory, so it is bounded;
      simulated CPU devices share one thread pool and deadlock in a collective when several steps are queued.
    """

    devices: list[jax.Device]
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    in_flight: int

    def _sharding(self, *axes: str) -> NamedSharding:
        return NamedSharding(Mesh(np.array(self.devices), (AXIS,)), PartitionSpec(*axes))

    @property
    def replicated(self) -> NamedSharding:
        """How the state lies on the devices."""
        return self._sharding()

    def place(self, state: Tree) -> Tree:
        """Put a whole state on every device."""
        return jax.device_put(state, self.replicated)

    def put(self, batch: Batch) -> Batch:
        """Cut a host batch into one part a device and start the transfer."""
        count = len(self.devices)
        parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
        return jax.device_put(parts, self._sharding(AXIS))


def pmap_engine(
    make_step: Callable[[str | None], Callable], devices: list[jax.Device], batch_size: int, accumulate: int
) -> PmapEngine:
    """Compile the step that `make_step(axis_name)` builds for data parallel training; the state is donated.

    Raises:
      StatedError: the batch does not divide.
    """
    count = len(devices)
    if batch_size % (count * accumulate):
        raise StatedError(
            f"batch_size {batch_size} is not divisible by {count} devices x accumulate {accumulate} "
            f"(nearest that is: {max(1, round(batch_size / (count * accumulate))) * count * accumulate})"
        )
    # A mean over one device would copy every gradient.
    axis = AXIS if count > 1 else None
    step = jax.pmap(
        make_step(axis), axis_name=AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=0, devices=devices
    )
    simulated = devices[0].platform == "cpu" and count > 1
    return PmapEngine(devices, step, in_flight=1 if simulated else 8)
