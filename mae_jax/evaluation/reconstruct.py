"""Reconstructions of images, and a picture of them, as a pretraining run draws it."""

from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from mae_jax import rng
from mae_jax.config import AugmentConfig, ModelConfig, wide
from mae_jax.models import Params
from mae_jax.models.mae import MaskedAutoencoder, Output, from_coefficients, patch_statistics
from mae_jax.models.masking import Noise
from mae_jax.models.patches import patchify, unpatchify
from mae_jax.train.objective import normalise_images

Bytes = UInt8[Array, "batch height width channels"]

HIDDEN_GREY = 0.5


class View(NamedTuple):
    """One column of the picture."""

    caption: str
    images: np.ndarray  # uint8 (batch, height, width, channels)


def sample_noise(seed: int, count: int, config: ModelConfig) -> Noise:
    """Draw the noise of the pictures' masks: (count, L), the same in every run of this seed."""
    return rng.example_uniforms(
        rng.device_key(seed, "samples"), jnp.arange(count, dtype=jnp.uint32), config.num_patches
    )


@partial(jax.jit, static_argnames=("model", "augment", "placement"))
def _columns(
    params: Params,
    images: Bytes,
    noise: Noise,
    model: ModelConfig,
    augment: AugmentConfig,
    placement: NamedSharding | None,
) -> list[Bytes]:
    """Compute the columns of the picture."""
    dtype = wide(model.dtype)
    pixels = normalise_images(images, augment, dtype)
    output = cast(Output, MaskedAutoencoder(model).apply({"params": params}, pixels, noise))
    patches = patchify(pixels, model.patch_hw)
    hidden = output.mask[..., None].astype(dtype)
    mean, std = (jnp.asarray(values, dtype) for values in (augment.mean, augment.std))

    def picture(patches: Float[Array, "batch patches values"]) -> Bytes:
        """Turn normalised patches back into bytes."""
        unit = unpatchify(patches, model.grid, model.patch_hw) * std + mean
        return jnp.round(jnp.clip(unit, 0, 1) * 255).astype(jnp.uint8)

    # What the model predicts, as pixels. Of normalised patches there are two views: as it is, and denormalised.
    grey = patchify(jnp.broadcast_to((HIDDEN_GREY - mean) / std, pixels.shape), model.patch_hw)
    restored = [output.pred]
    if model.pca_components is not None:
        restored = [from_coefficients(output.pred, **params["target"])]
    if model.norm_pix_loss:
        centre, deviation = patch_statistics(patches)
        restored.append(output.pred * deviation + centre)
    columns = [patches, jnp.where(hidden == 1, grey, patches), *restored, jnp.where(hidden == 1, restored[-1], patches)]
    pictures = [picture(column) for column in columns]
    return pictures if placement is None else jax.lax.with_sharding_constraint(pictures, placement)


# A star marks views that use the original image; STAR explains it below the title.
CAPTIONS = {
    False: ("original", "masked", "reconstruction", "with visible"),
    True: ("original", "masked", "raw prediction", "denormalised*", "with visible*"),
}
STAR = "* with the true mean and deviation of each patch, which the model does not predict"


def reconstruct(
    params: Params,
    images: np.ndarray,
    noise: Noise,
    model: ModelConfig,
    augment: AugmentConfig,
    placement: NamedSharding | None = None,
) -> list[View]:
    """Make the columns: original, masked, reconstruction, and that with the visible patches pasted in.

    placement: of the result, which every host must be able to read; needed where parameters are cut over several.

    Principal coefficients are turned back into pixels. A model of normalised pixels predicts no brightness: its raw
    prediction is shown as it is, and once more with the true mean and deviation of each patch, which the caption marks
    with a star.
    """
    columns = _columns(params, jnp.asarray(images), noise, model, augment, placement)
    return [View(*pair) for pair in zip(CAPTIONS[model.norm_pix_loss], map(np.asarray, columns), strict=True)]


def draw(views: list[View], title: str) -> Image.Image:
    """Draw a grid, one row an example and one column a view, pixels enlarged in whole steps, captions above."""
    _, height, width, channels = views[0].images.shape
    # Lines of text on top (title, star, channels, captions), then a row of cells for each image.
    scale = max(1, 128 // max(height, width))
    font = ImageFont.load_default(size=13)
    cell_width, cell_height, gap = max(width * scale, 100), height * scale, 6
    notes = [title] + ([STAR] if any(view.caption.endswith("*") for view in views) else [])
    drawn = 3 if channels >= 3 else 1
    notes += [f"the first {drawn} of {channels} channels"] if drawn != channels else []
    top = 20 * (len(notes) + 1) + gap
    rows = len(views[0].images)
    sheet_width = max(len(views) * (cell_width + gap) + gap, *(int(font.getlength(note)) + 2 * gap for note in notes))
    sheet = Image.new("RGB", (sheet_width, top + rows * (cell_height + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for line, note in enumerate(notes):
        pen.text((gap, 20 * line + 3), note, fill="black", font=font)
    for column, view in enumerate(views):
        left = gap + column * (cell_width + gap)
        pen.text((left, 20 * len(notes) + 3), view.caption, fill="black", font=font)
        for row, image in enumerate(view.images):
            shown = Image.fromarray(image[..., :3] if drawn == 3 else image[..., 0])
            enlarged = shown.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left, top + row * (cell_height + gap)))
    return sheet
