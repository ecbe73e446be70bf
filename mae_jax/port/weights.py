"""A model as it is carried from one format to another."""

from dataclasses import dataclass, replace

from mae_jax.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig, Size
from mae_jax.errors import StatedError
from mae_jax.models import Params
from mae_jax.models.patches import resize_positions
from mae_jax.port.keys import Config, Part, Tensors, encoder_config


@dataclass(frozen=True)
class Weights:
    """Configuration and parameters, and how images are normalised for them.

    part: `encoder` where the source has no decoder.
    tensors: as they were read, under the authors' names; None where they come from a run.
    notes: what was assumed, changed or left out on the way, in sentences.
    """

    config: Config
    params: Params  # NumPy
    part: Part
    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: str
    tensors: Tensors | None = None
    notes: tuple[str, ...] = ()
    normalisation_known: bool = True  # mean and std are the source's own, not what is usual
    resized: bool = False  # for images of another size than the tensors were made for


def default_normalisation(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation where none are known: ImageNet's for three channels, 0.5 for others."""
    return (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)


def for_image_size(weights: Weights, size: Size) -> Weights:
    """Fit weights to images of another size: frozen positions are computed anew, learned ones resized.

    Raises:
      StatedError: patches do not divide that size.
    """
    old = encoder_config(weights.config)
    try:
        new = replace(old, image_size=size)
    except ValueError as error:
        raise StatedError(str(error), field="image_size") from error
    if new.grid == old.grid:
        return replace(weights, config=_with_model(weights.config, new))
    params = weights.params
    if old.positions == "learned":
        for stack in ("encoder", "decoder"):
            if "pos_embed" in params.get(stack, {}):
                table = resize_positions(params[stack]["pos_embed"][0], old.grid, new.grid, old.class_token)
                params = params | {stack: params[stack] | {"pos_embed": table[None]}}
    how = (
        "learned positions are resized (bicubic)" if old.positions == "learned" else "sin-cos positions are recomputed"
    )
    grids = " to ".join(f"{rows} x {columns}" for rows, columns in (old.grid, new.grid))
    note = f"image size {old.image_size} to {size}: {how} from {grids} patches"
    return replace(
        weights, config=_with_model(weights.config, new), params=params, notes=(*weights.notes, note), resized=True
    )


def _with_model(config: Config, model: ModelConfig) -> Config:
    return replace(config, model=model) if config.kind == "classifier" else model
