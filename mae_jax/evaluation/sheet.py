"""The picture of `mae-jax reconstruct`: reconstructions by a run that has been saved."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mae_jax import rng
from mae_jax.config import PretrainConfig
from mae_jax.data.evaluation import load_images, load_samples
from mae_jax.data.sources.source import open_source
from mae_jax.errors import StatedError
from mae_jax.evaluation.reconstruct import draw, reconstruct, sample_noise
from mae_jax.storage.loading import load_params


def reconstruction_sheet(
    run: Path, files: Sequence[str], *, mask_ratio: float | None = None, seed: int = 0, samples: int = 8
) -> Image.Image:
    """Draw reconstructions of image files, or of `samples` images of the data that the run was trained on.

    Raises:
      StatedError: no checkpoint, a file does not decode, or the mask ratio does not fit the model.
    """
    config, params, step = load_params(run, part="all")
    model = config.model
    if mask_ratio is not None:
        try:
            model = dataclasses.replace(model, mask_ratio=mask_ratio)
        except ValueError as error:
            raise StatedError(str(error), field="mask_ratio") from error
    share = config.augment.evaluation_crop
    images = load_images(files, model.image_hw, model.in_channels, share) if files else _samples(config, seed, samples)
    views = reconstruct(params, images, sample_noise(seed, len(images), model), model, config.augment)
    shown = f"{len(files)} files" if files else config.data
    return draw(views, f"{shown}, step {step}, {1 - model.keep / model.num_patches:.1%} of patches hidden")


def _samples(config: PretrainConfig, seed: int, count: int) -> np.ndarray:
    """Load some images of the data that a run was trained on, the same for every run of this seed."""
    source = open_source(config.data, config.model.in_channels)
    if not 1 <= count <= len(source):
        raise StatedError(f"samples {count} is not in 1 .. {len(source)}, the images of {config.data}", field="samples")
    order = rng.host_generator(seed, "samples", 0).permutation(len(source))
    return load_samples(source, order.tolist(), count, config.model.image_hw, config.augment.evaluation_crop)
