"""How a pure step is compiled and spread over devices.

Every engine takes a batch as the host has it and returns the state in the same pytree:

- `pmap`: data parallel over the devices of one host. The state is the same on every device; batches are cut along
  their first axis; gradients are averaged inside the step over AXIS.
- `jit` and `fsdp` (mae_jax/train/mesh.py): the compiler cuts the step by how its state and batch lie on a mesh.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mae_jax.config import ModelConfig
from mae_jax.errors import StatedError
from mae_jax.train.objective import Batch
from mae_jax.train.step import Step

AXIS = "data"
AMPERE = "8.0"  # compute capability of the oldest GPUs for which cuDNN has fused attention

Tree = TypeVar("Tree")


class Engine(Protocol):
    """A compiled step over devices, and how its state and batches come to them.

    in_flight: how many steps the host may run ahead of the device. Batches wait in device memory, so it is bounded;
      simulated CPU devices share one thread pool and deadlock in a collective when several steps are queued.
    """

    @property
    def devices(self) -> list[jax.Device]: ...

    @property
    def step(self) -> Step: ...

    @property
    def in_flight(self) -> int: ...

    def shardings(self, tree: Any) -> Any:
        """Return the sharding of each array of a state, or of shapes, as a tree of the same structure."""

    def put_state(self, state: Tree) -> Tree:
        """Copy a state that this host holds whole to the devices, each array to its sharding."""

    def init_state(self, init: Callable[[], Tree]) -> Tree:
        """Compute the state that `init` returns directly in its shardings: no device ever holds more than its shard."""

    def put_batch(self, batch: Batch) -> Batch:
        """Shard this host's rows of a batch over its devices for `step`, and start the transfer."""

    def put_rows(self, arrays: Tree) -> Tree:
        """Shard this host's rows of arrays over its devices along their first axis, for any compiled function."""


def choose_devices(count: int | None) -> list[jax.Device]:
    """List the first `count` devices of each host, or all, host by host.

    Raises:
      StatedError: a host has fewer, or they do not all have as many.
    """
    # Sorted by host, so that a host's rows of a batch and its devices are neighbours wherever devices are in a row.
    by_host: dict[int, list[jax.Device]] = {}
    for device in sorted(jax.devices(), key=lambda device: (device.process_index, device.id)):
        by_host.setdefault(device.process_index, []).append(device)
    local = jax.local_devices()
    if count is not None and count > len(local):
        message = f"devices {count} asked for, this host has {len(local)} ({local[0].platform})"
        raise StatedError(message, field="devices")
    used = [found[:count] for found in by_host.values()]
    if len({len(found) for found in used}) > 1:
        numbers = ", ".join(f"{len(found)} on host {host}" for host, found in by_host.items())
        raise StatedError(f"devices differ: {numbers}. Give --devices {min(map(len, used))}", field="devices")
    return [device for found in used for device in found]


def check_divides(batch_size: int, devices: int, accumulate: int) -> None:
    """Refuse a batch that cannot be cut into equal parts.

    Raises:
      StatedError: it does not divide.
    """
    parts = devices * accumulate
    if batch_size % parts:
        raise StatedError(
            f"batch_size {batch_size} is not divisible by {devices} devices x accumulate {accumulate} "
            f"(nearest that is: {max(1, round(batch_size / parts)) * parts})",
            field="batch_size",
        )


def check_attention(model: ModelConfig, devices: list[jax.Device], fsdp: int = 1) -> None:
    """Refuse cuDNN's attention where there is no GPU that has it, or parameters are cut so that its heads cannot be.

    cuDNN has it for compute capability 8.0 and more; AMD's GPUs have a name there, such as gfx942. The compiler cuts
    heads as the parameters that they come from, and fails where that leaves some of unequal size.

    Raises:
      StatedError: it cannot be computed.
    """
    if model.attention != "cudnn":
        return
    if devices[0].platform != "gpu":
        raise StatedError(
            f"model.attention cudnn needs an NVIDIA GPU, the device here is {devices[0].platform}: give xla",
            field="model.attention",
        )
    # A device without the attribute is left to JAX, which looks again.
    capability = getattr(devices[0], "compute_capability", AMPERE)
    if not re.fullmatch(r"\d+\.\d+", capability) or float(capability) < float(AMPERE):
        raise StatedError(
            f"model.attention cudnn needs an NVIDIA GPU of compute capability {AMPERE} or more, that of the device "
            f"here is {capability}: give xla",
            field="model.attention",
        )
    for name, heads in (("encoder", model.encoder.heads), ("decoder", model.decoder.heads)):
        if math.gcd(heads, fsdp) not in (1, fsdp):
            raise StatedError(
                f"model.attention cudnn cannot cut {name}.heads {heads} over fsdp {fsdp}: give an --fsdp that divides "
                "it, or attention xla",
                field="fsdp",
            )


def steps_in_flight(devices: list[jax.Device]) -> int:
    """Return how many steps the host may run ahead of these devices (`Engine.in_flight`)."""
    simulated = devices[0].platform == "cpu" and len(devices) > 1
    return 1 if simulated else 8


@dataclass(frozen=True)
class PmapEngine:
    """A step over `devices` of this host, the state whole on each."""

    devices: list[jax.Device]
    step: Step
    in_flight: int

    def _sharding(self, *axes: str) -> NamedSharding:
        return NamedSharding(Mesh(np.array(self.devices), (AXIS,)), PartitionSpec(*axes))

    def shardings(self, tree: Any) -> Any:
        """Return the sharding that replicates an array on every device, for each array of a tree."""
        return jax.tree.map(lambda _: self._sharding(), tree)

    def put_state(self, state: Tree) -> Tree:
        """Replicate a state on every device."""
        return jax.device_put(state, self._sharding())

    def init_state(self, init: Callable[[], Tree]) -> Tree:
        """Compute the state that `init` returns on one device, as one program, and copy it to the others."""
        return self.put_state(jax.jit(init)())

    def put_batch(self, batch: Batch) -> Batch:
        """Shard a batch over the devices for `step`, and start the transfer.

        The parts are a first axis of their own, which pmap takes away: (devices, rows of one, ...).
        """
        count = len(self.devices)
        return self.put_rows(jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch))

    def put_rows(self, arrays: Tree) -> Tree:
        """Shard arrays over the devices along their first axis."""
        return jax.device_put(arrays, self._sharding(AXIS))


def pmap_engine(
    make_step: Callable[[str | None], Step], devices: list[jax.Device], batch_size: int, accumulate: int
) -> PmapEngine:
    """Compile the step that `make_step(axis_name)` builds for data parallel training; the state is donated.

    Raises:
      StatedError: the batch does not divide, or there are several hosts.
    """
    if jax.process_count() > 1:
        message = f"engine pmap works on one host, these are {jax.process_count()}: give --engine jit or fsdp"
        raise StatedError(message, field="engine")
    check_divides(batch_size, len(devices), accumulate)
    # A mean over one device would copy every gradient.
    axis = AXIS if len(devices) > 1 else None
    # in_axes, out_axes None: the state goes in and comes out as it is, without an axis of devices, and replicated.
    step = jax.pmap(
        make_step(axis), axis_name=AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=0, devices=devices
    )
    return PmapEngine(devices, step, steps_in_flight(devices))
