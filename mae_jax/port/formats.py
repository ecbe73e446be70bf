"""What can be written: each format's files, and the models that it cannot express."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from mae_jax.errors import StatedError
from mae_jax.port.keys import Config, Part, encoder_config
from mae_jax.port.tensors import SAFETENSORS, TORCH_SUFFIXES

Format = Literal["fair", "timm", "huggingface", "lightly", "lightly-deprecated", "jax"]

# The file that a format writes where the destination is a folder, and the endings that it can have elsewhere.
_FILES: dict[Format, tuple[str, tuple[str, ...]]] = {
    "fair": ("checkpoint.pth", TORCH_SUFFIXES),
    "timm": ("model.safetensors", (SAFETENSORS, *TORCH_SUFFIXES)),
    "lightly": ("checkpoint.pth", (SAFETENSORS, *TORCH_SUFFIXES)),
    "lightly-deprecated": ("checkpoint.pth", (SAFETENSORS, *TORCH_SUFFIXES)),
}


def is_folder(destination: Path, to: Format) -> bool:
    """Return whether a folder is to be written: always by some formats, by the others where no known ending is given.

    Raises:
      StatedError: the destination has the ending of a file that this format is not.
    """
    suffix = destination.suffix
    known = suffix in (*TORCH_SUFFIXES, SAFETENSORS)
    if to not in _FILES:
        if known:
            raise StatedError(
                f"{destination}: {to} is a folder, not a {suffix} file; leave the ending off", field="destination"
            )
        return True
    if known and suffix not in _FILES[to][1]:
        raise StatedError(
            f"{destination}: {to} cannot be a {suffix} file ({', '.join(_FILES[to][1])})", field="destination"
        )
    return not known


def file_in(folder: Path, to: Format) -> Path:
    """Return the weights' file in a folder that a format writes."""
    return folder / (_FILES[to][0] if to in _FILES else "model.safetensors")


def require_expressible(config: Config, to: Format, part: Part) -> None:
    """Refuse a model that a format cannot express.

    Raises:
      StatedError: with every reason.
    """
    reasons = list(_reasons(config, to, part))
    if reasons:
        raise StatedError(f"{to} cannot express this model: {'; '.join(reasons)}", field="to")


def _reasons(config: Config, to: Format, part: Part) -> Iterator[str]:
    model = encoder_config(config)
    if config.kind == "classifier":
        if to not in ("fair", "timm"):
            yield "it is a classifier, which goes to fair or timm"
        elif part == "encoder" and config.pooling == "mean":
            yield "part encoder of a classifier that pools the mean has no LayerNorm behind its blocks"
        return
    if to == "jax":
        return
    if model.pca_components is not None and part == "all" and to != "timm":
        yield (
            f"pca_components {model.pca_components}, and its decoder predicts pixels "
            "(--part encoder leaves the decoder out)"
        )
    if model.encoder_mask_tokens and part == "all" and to != "timm":
        yield "encoder_mask_tokens True, and its encoder takes no mask tokens (--part encoder leaves them out)"
    if to == "timm":
        return
    image_hw, patch_hw = model.image_hw, model.patch_hw
    if image_hw[0] != image_hw[1]:
        yield f"image_size {image_hw} is not square, as its positions and patches have to be"
    if patch_hw[0] != patch_hw[1]:
        yield f"patch_size {patch_hw} is not square"
    if model.positions == "sincos1d":
        yield "positions sincos1d, where its own are two-dimensional"
    if not model.class_token and to in ("fair", "huggingface"):
        yield "class_token False, which its code always has"
    if to == "fair" and part == "all" and model.encoder.mlp_ratio != model.decoder.mlp_ratio:
        yield f"mlp_ratio {model.encoder.mlp_ratio} and {model.decoder.mlp_ratio}, where it has one for both stacks"


def remarks(config: Config, to: Format, part: Part) -> Iterator[str]:
    """List what a user of the written file should know."""
    model = encoder_config(config)
    if to == "timm" and config.kind == "mae" and part == "all":
        yield "timm takes the encoder alone: the decoder is left out"
    if part == "encoder" or to in ("jax", "timm"):
        return
    if model.positions == "learned" and config.kind == "mae":
        yield f"learned positions are carried over, but {to} freezes them when it trains"
    if to.startswith("lightly") and model.norm_pix_loss:
        yield "Lightly's loss knows no normalised pixels: this model predicts them"
    if model.masking != "random" or model.loss_on != "hidden":
        yield f"masking {model.masking} and loss_on {model.loss_on} are not carried over: {to} has random and hidden"
    if to == "fair" and model.in_channels != 3:
        yield f"the authors' patchify takes 3 channels, not {model.in_channels}: weights load, the loss does not run"
