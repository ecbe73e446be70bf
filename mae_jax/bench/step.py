"""This project's training step ready to be timed, as `mae-jax pretrain` runs it, and the device's own best beside it.

Needs neither grain, nor tensorflow-datasets, nor tyro.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.bench.recipe import ReadyStep, peak_host_bytes, pixels
from mae_jax.bench.table import MatrixRate
from mae_jax.config import PretrainConfig
from mae_jax.errors import StatedError
from mae_jax.train.engines import check_attention, choose_devices, pmap_engine
from mae_jax.train.objective import Batch
from mae_jax.train.step import init_state, make_step

# Factors are square. On a CPU the larger one would take minutes, and gains nothing.
SIZE, CPU_SIZE = 8192, 1024
SECONDS = 1.0  # of products at least, since a moment in which a machine is busy elsewhere is not its rate


def check_device(asked: str | None) -> None:
    """Refuse a GPU that was asked for by `recipe.use` and that JAX does not find.

    Raises:
      StatedError: there is none.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        if asked != "gpu":
            raise
        raise StatedError("JAX finds no GPU here that it can use: give --device cpu", field="device") from error


def ready_step(config: PretrainConfig) -> ReadyStep:
    """Compile the step for one device, with its batch there."""
    devices = choose_devices(1)
    check_attention(config.model, devices)
    engine = pmap_engine(
        lambda axis: make_step(config, steps_per_epoch=1000.0, epochs=100.0, axis_name=axis),
        devices,
        config.batch_size,
        config.accumulate,
    )
    batch = engine.put_batch(Batch(pixels(config), np.arange(config.batch_size, dtype=np.uint32)))
    state = engine.init_state(lambda: init_state(config))
    began = time.perf_counter()
    compiled = engine.step.lower(state, batch).compile()  # type: ignore[attr-defined]
    seconds = time.perf_counter() - began

    def step() -> None:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))

    device = engine.devices[0]

    def peak_bytes() -> int:
        return peak_host_bytes() if device.platform == "cpu" else device.memory_stats()["peak_bytes_in_use"]

    return ReadyStep(step, peak_bytes, seconds, f"jax {jax.__version__}", device.device_kind, compiled.as_text)


def matrix_rate(dtype: str, repeats: int = 10) -> MatrixRate:
    """Time products of two large square matrices, the most that the device multiplies: a step's FLOP/s are a share.

    The best of `repeats` or more, each waited for, after two untimed.
    """
    size = CPU_SIZE if jax.devices()[0].platform == "cpu" else SIZE
    left, right = (jax.random.normal(jax.random.key(seed), (size, size), dtype) for seed in (0, 1))
    product = jax.jit(jnp.matmul)
    for _ in range(2):
        product(left, right).block_until_ready()
    seconds: list[float] = []
    while len(seconds) < repeats or sum(seconds) < SECONDS:
        began = time.perf_counter()
        product(left, right).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return MatrixRate(2 * size**3 / min(seconds), size, dtype)
