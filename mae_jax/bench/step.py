"""This project's training step ready to be timed, as `mae-jax pretrain` runs it.

Needs neither grain, nor tensorflow-datasets, nor tyro.
"""

import dataclasses
import os
import resource
import time
from collections.abc import Callable

import jax
import numpy as np

from mae_jax.config import MODELS, AttentionKernel, AugmentConfig, Dtype, ModelConfig, OptimConfig, PretrainConfig
from mae_jax.errors import StatedError
from mae_jax.presets.pretraining import PRESETS
from mae_jax.train.engines import check_attention, choose_devices, pmap_engine
from mae_jax.train.objective import Batch
from mae_jax.train.step import init_state, make_step


@dataclasses.dataclass(frozen=True)
class ReadyStep:
    """A compiled training step, of any framework.

    step: one step, waited for.
    peak_bytes: the most memory held so far, of the device or, on a CPU, of the process.
    program: the compiled program as text, where there is one.
    """

    step: Callable[[], None]
    peak_bytes: Callable[[], int]
    compile_seconds: float
    version: str
    device: str
    program: Callable[[], str] = str


def use(device: str | None) -> None:
    """Have JAX, which is not imported yet, run on "cpu" or "gpu"; on what it finds where that is None."""
    if device is not None:
        os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda"}[device]


def named_model(name: str) -> ModelConfig:
    """A model by its own name, or by that of a preset.

    Raises:
      StatedError: there is none of that name.
    """
    if name in MODELS:
        return MODELS[name]
    if name in PRESETS:
        return PRESETS[name]().model
    raise StatedError(f"model {name} is unknown; there are {', '.join([*MODELS, *PRESETS])}")


def bench_config(
    name: str,
    batch: int,
    dtype: Dtype,
    mask_tokens: bool = False,
    remat: bool = False,
    attention: AttentionKernel = "xla",
) -> PretrainConfig:
    """What is timed: normalised pixels, the paper's optimizer, one device.

    Raises:
      StatedError: the model is unknown, or one of the values is refused.
    """
    if batch < 1:
        raise StatedError(f"batch {batch} must be positive")
    try:
        model = dataclasses.replace(
            named_model(name),
            dtype=dtype,
            norm_pix_loss=True,
            encoder_mask_tokens=mask_tokens,
            remat=remat,
            attention=attention,
        )
    except ValueError as error:
        raise StatedError(str(error)) from error
    half = (0.5,) * model.in_channels
    augment = AugmentConfig(mean=half, std=half)
    return PretrainConfig(model=model, augment=augment, optim=OptimConfig(), batch_size=batch, devices=1)


def pixels(config: PretrainConfig) -> np.ndarray:
    """A batch of noise, as images come: uint8 (batch, height, width, channels)."""
    shape = (config.batch_size, *config.model.image_hw, config.model.in_channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def peak_host_bytes() -> int:
    """The most memory that this process has held (Linux counts kilobytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check_device(asked: str | None) -> None:
    """Refuse a GPU that was asked for by `setting.use` and that JAX does not find.

    Raises:
      StatedError: there is none.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        if asked != "gpu":
            raise
        raise StatedError("JAX finds no GPU here that it can use: give --device cpu") from error


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
    batch = engine.put(Batch(pixels(config), np.arange(config.batch_size, dtype=np.uint32)))
    state = engine.begin(lambda: init_state(config))
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
