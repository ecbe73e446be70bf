"""Engines `jit` and `fsdp`: one program for all devices of all hosts, cut by the compiler along a mesh.

The mesh has two axes, DATA and SHARD, and every device gets its own rows of the batch. Engine `jit` is a SHARD axis of
one device: the state lies whole on each. Under `fsdp` each matrix of the state, and with it each gradient, is cut over
the SHARD axis (ZeRO stage 3, Rajbhandari et al. 2019): the compiler gathers a layer's weights where they are used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mae_jax.errors import StatedError
from mae_jax.train.engines import check_divides, steps_in_flight
from mae_jax.train.objective import Batch
from mae_jax.train.step import Step, TrainState

DATA, SHARD = "data", "shard"

Tree = TypeVar("Tree")


def make_mesh(devices: list[jax.Device], fsdp: int) -> Mesh:
    """Lay devices out in order, `fsdp` neighbours to a group that shares one copy of the state.

    Raises:
      StatedError: they do not make such groups.
    """
    if fsdp > len(devices):
        raise StatedError(f"fsdp {fsdp} needs as many devices, there are {len(devices)}", field="fsdp")
    if len(devices) % fsdp:
        nearest = max(n for n in range(1, fsdp) if len(devices) % n == 0)
        raise StatedError(
            f"fsdp {fsdp} does not divide {len(devices)} devices (the largest below that does: {nearest})",
            field="fsdp",
        )
    return Mesh(np.array(devices).reshape(-1, fsdp), (DATA, SHARD))


def cut(shape: tuple[int, ...], count: int) -> PartitionSpec:
    """Choose the dimension of an array of the state that is cut in `count`: the longest that divides.

    Vectors stay whole: they are a thousandth of the state, and each would cost a message of its own.
    """
    candidates = [axis for axis, size in enumerate(shape) if size % count == 0]
    if len(shape) < 2 or count == 1 or not candidates:
        return PartitionSpec()
    longest = max(candidates, key=lambda axis: shape[axis])
    return PartitionSpec(*[None] * longest, SHARD)


@dataclass(frozen=True)
class MeshEngine:
    """A step over all devices of a mesh, some of which may be other hosts'."""

    mesh: Mesh
    step: Step
    in_flight: int

    @property
    def devices(self) -> list[jax.Device]:
        return list(self.mesh.devices.flat)

    def shardings(self, tree: Any) -> Any:
        """Return the sharding of each array of a state, or of shapes, as a tree of the same structure."""
        return shardings(self.mesh, tree)

    def put_state(self, state: Tree) -> Tree:
        """Copy a state that every host holds whole to the devices, each array to its sharding."""
        return jax.device_put(state, self.shardings(state))

    def init_state(self, init: Callable[[], Tree]) -> Tree:
        """Compute the state that `init` returns directly in its shardings: no device ever holds more than its shard."""
        return jax.jit(init, out_shardings=self.shardings(jax.eval_shape(init)))()

    def put_batch(self, batch: Batch) -> Batch:
        """Shard this host's rows of a batch over its devices for `step`, and start the transfer."""
        return self.put_rows(batch)

    def put_rows(self, arrays: Tree) -> Tree:
        """Shard this host's rows of arrays over its devices along their first axis."""
        # A global array whose rows are those of host 0, then of host 1 ...; no host sees the others' values.
        rows = NamedSharding(self.mesh, PartitionSpec((DATA, SHARD)))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, np.asarray(x)), arrays)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Return the sharding of each array of a state, or of shapes, on a mesh."""
    return jax.tree.map(lambda x: NamedSharding(mesh, cut(x.shape, mesh.shape[SHARD])), tree)


def mesh_engine(
    step: Step, state: TrainState, devices: list[jax.Device], batch_size: int, accumulate: int, fsdp: int = 1
) -> MeshEngine:
    """Compile a step that averages over no axis of its own; the state is donated.

    state: shapes, as of jax.eval_shape. fsdp: devices that one copy of the state is cut over.

    Raises:
      StatedError: the batch does not divide, or the devices do not.
    """
    mesh = make_mesh(devices, fsdp)
    check_divides(batch_size, len(devices), accumulate)
    whole = NamedSharding(mesh, PartitionSpec())
    # The compiler sees one program over the whole batch. Where the state lies is fixed here for the result, and by the
    # arguments for the input; all communication follows from that.
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings(mesh, state), whole))
    return MeshEngine(mesh, compiled, steps_in_flight(devices))
