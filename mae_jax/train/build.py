"""From a configuration to the length of its run and the compiled step."""

import functools
import math
from typing import NamedTuple

import jax

from mae_jax import rng
from mae_jax.config import Run
from mae_jax.errors import StatedError
from mae_jax.train.engines import Engine, check_attention, choose_devices, pmap_engine
from mae_jax.train.step import TrainState, init_state, make_step


class Length(NamedTuple):
    """How long a run is: `steps` updates, which are `epochs` epochs of `steps_per_epoch`.

    All but the first may be fractional: the stream of examples runs on over the end of an epoch.
    """

    steps: int
    steps_per_epoch: float
    epochs: float


def run_length(config: Run, examples: int) -> Length:
    """Compute the length of a run on so many examples.

    Raises:
      StatedError: it would number more examples than a position can.
    """
    steps_per_epoch = examples / config.batch_size
    steps = config.steps if config.steps is not None else max(1, math.ceil(config.epochs * steps_per_epoch))
    if steps * config.batch_size > rng.MAX_POSITION:
        raise StatedError(
            f"steps {steps} x batch_size {config.batch_size} is more than the {rng.MAX_POSITION} examples of one run",
            field="steps",
        )
    return Length(steps, steps_per_epoch, steps / steps_per_epoch)


def state_shapes(config: Run) -> TrainState:
    """Return the state with shapes in place of arrays."""
    return jax.eval_shape(lambda: init_state(config))


def build_engine(config: Run, length: Length) -> Engine:
    """Compile the step of a run on the devices that it asks for.

    Raises:
      StatedError: there are not so many devices, batch or devices do not divide, float64 is not switched on, the engine
        does not work on several hosts and there are several, or cuDNN is asked for where it cannot compute attention.
    """
    if config.model.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise StatedError(
            'model.dtype float64 needs jax.config.update("jax_enable_x64", True) before the run', field="model.dtype"
        )
    build = functools.partial(make_step, config, steps_per_epoch=length.steps_per_epoch, epochs=length.epochs)
    devices, batch_size, accumulate = choose_devices(config.devices), config.batch_size, config.accumulate
    fsdp = (config.fsdp or len(devices)) if config.engine == "fsdp" else 1
    check_attention(config.model, devices, fsdp)
    if config.engine == "pmap":
        return pmap_engine(lambda axis: build(axis_name=axis), devices, batch_size, accumulate)
    from mae_jax.train.mesh import mesh_engine  # noqa: PLC0415 - few runs need it

    return mesh_engine(build(), state_shapes(config), devices, batch_size, accumulate, fsdp)
