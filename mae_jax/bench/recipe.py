"""What is timed, on every side: a model, its optimizer, a batch of noise. It imports no framework.

So a PyTorch side can share it without JAX's memory being counted as its own.
"""

import dataclasses
import os
import resource
from collections.abc import Callable

import numpy as np

from mae_jax.config import MODELS, AttentionKernel, AugmentConfig, Dtype, ModelConfig, OptimConfig, PretrainConfig
from mae_jax.errors import StatedError
from mae_jax.presets.pretraining import PRESETS


@dataclasses.dataclass(frozen=True)
class ReadyStep:
    """A compiled training step, of any framework.

    step: runs one step and waits for it.
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
    """Make JAX, which is not imported yet, run on "cpu" or "gpu"; on what it finds where that is None."""
    if device is not None:
        os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda"}[device]


def named_model(name: str) -> ModelConfig:
    """Return a model by its own name, or by that of a preset.

    Raises:
      StatedError: there is none of that name.
    """
    if name in MODELS:
        return MODELS[name]
    if name in PRESETS:
        return PRESETS[name]().model
    raise StatedError(f"model {name} is unknown; there are {', '.join([*MODELS, *PRESETS])}", field="model")


def bench_config(
    name: str,
    batch: int,
    dtype: Dtype,
    mask_tokens: bool = False,
    remat: bool = False,
    attention: AttentionKernel = "xla",
) -> PretrainConfig:
    """Return the run that is timed: normalised pixels, the paper's optimizer, one device.

    Raises:
      StatedError: the model is unknown, or one of the values is refused.
    """
    if batch < 1:
        raise StatedError(f"batch {batch} must be positive", field="batch")
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
        raise StatedError(str(error), field="model") from error
    half = (0.5,) * model.in_channels
    augment = AugmentConfig(mean=half, std=half)
    return PretrainConfig(model=model, augment=augment, optim=OptimConfig(), batch_size=batch, devices=1)


def pixels(config: PretrainConfig) -> np.ndarray:
    """Draw a batch of noise, as images come: uint8 (batch, height, width, channels)."""
    shape = (config.batch_size, *config.model.image_hw, config.model.in_channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def peak_host_bytes() -> int:
    """Return the most memory that this process has held (Linux counts kilobytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
