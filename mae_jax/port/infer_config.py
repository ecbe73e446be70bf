"""The configuration that a checkpoint's shapes imply; what is in no tensor comes from hints, or is asked for."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from mae_jax.config import MODELS, ClassifierConfig, Dtype, ModelConfig, Positions, Size, TransformerConfig
from mae_jax.errors import StatedError, shown
from mae_jax.models.patches import fixed_positions
from mae_jax.port.keys import Config, is_table


@dataclass(frozen=True)
class Hints:
    """What is known beside the tensors: from arguments, a config.json, or the user; None where nothing is."""

    encoder_heads: int | None = None
    decoder_heads: int | None = None
    image_size: Size | None = None  # of the file's position table
    mask_ratio: float | None = None
    norm_pix_loss: bool | None = None

    def over(self, other: "Hints") -> "Hints":
        """Return these hints, filled up with the other's where these are None."""
        return Hints(
            *(mine if mine is not None else theirs for mine, theirs in zip(*map(_values, (self, other)), strict=True))
        )


def _values(hints: Hints) -> tuple[object, ...]:
    return tuple(vars(hints).values())


# Heads of the published widths: the sizes of the table, and the paper's decoder.
_ENCODER_HEADS = {model.encoder.width: model.encoder.heads for model in MODELS.values()}
_DECODER_HEADS = {model.decoder.width: model.decoder.heads for model in MODELS.values()}


def infer_config(tensors: Mapping[str, np.ndarray], hints: Hints, dtype: Dtype) -> Config:
    """Infer the configuration of tensors that carry the authors' names; the decoder is the paper's where none is.

    Raises:
      StatedError: a tensor that shows the configuration is missing, or heads or image size must be given.
    """
    width, channels, *patch_hw = _shape(tensors, "patch_embed.proj.weight", 4)
    rows = _shape(tensors, "pos_embed", 3)[1]
    # Where the token is missing from a table with a row for it, it is to be named, and not the table.
    class_token = "cls_token" in tensors or (
        math.isqrt(rows) ** 2 != rows and math.isqrt(rows - 1) ** 2 == rows - 1 and hints.image_size is None
    )
    widths = {"encoder": width}
    if "decoder_embed.weight" in tensors:
        widths["decoder"] = _shape(tensors, "decoder_embed.weight", 2)[0]
    heads = _heads(widths, hints)
    decoder = (
        _stack(tensors, "decoder", widths["decoder"], heads["decoder"]) if "decoder" in widths else ModelConfig.decoder
    )
    try:
        model = ModelConfig(
            image_size=_image_size(rows - class_token, (patch_hw[0], patch_hw[1]), hints.image_size),
            patch_size=patch_hw[0] if patch_hw[0] == patch_hw[1] else (patch_hw[0], patch_hw[1]),
            in_channels=channels,
            encoder=_stack(tensors, "encoder", width, heads["encoder"]),
            decoder=decoder,
            class_token=class_token,
            positions="learned",
            mask_ratio=ModelConfig.mask_ratio if hints.mask_ratio is None else hints.mask_ratio,
            norm_pix_loss=bool(hints.norm_pix_loss),
            dtype=dtype,
        )
        model = replace(model, positions=_positions(tensors, model))
        if "head.weight" not in tensors:
            return model
        classes = _shape(tensors, "head.weight", 2)[0]
        return ClassifierConfig(model, classes, "mean" if "fc_norm.weight" in tensors else "class")
    except ValueError as error:
        raise StatedError(f"the shapes make no model: {error}", field="source") from error


def _shape(tensors: Mapping[str, np.ndarray], key: str, dimensions: int) -> tuple[int, ...]:
    if key not in tensors:
        raise StatedError(f"{key} is missing, without which the configuration is unknown", field=key)
    shape = tuple(tensors[key].shape)
    if len(shape) != dimensions:
        raise StatedError(f"{key} has shape {shown(shape)}, where {dimensions} dimensions are expected", field=key)
    if 0 in shape:
        raise StatedError(f"{key} has shape {shape}, which holds nothing: save the model anew", field=key)
    return shape


def _heads(widths: Mapping[str, int], hints: Hints) -> dict[str, int]:
    """Return the heads of each stack: as given, or those of the published width.

    Raises:
      StatedError: neither is known; the flags to give them by are named.
    """
    known = {
        "encoder": _ENCODER_HEADS.get(widths["encoder"]) if hints.encoder_heads is None else hints.encoder_heads,
        "decoder": _DECODER_HEADS.get(widths.get("decoder", 0)) if hints.decoder_heads is None else hints.decoder_heads,
    }
    unknown = [stack for stack in widths if known[stack] is None]
    if unknown:
        flags = " and ".join(f"--{stack}-heads (width {widths[stack]})" for stack in unknown)
        names = ", ".join(f"{stack}_heads=" for stack in unknown)
        raise StatedError(
            f"heads are in no tensor, and this width is of no published model: give {flags}; in Python {names}",
            field=f"{unknown[0]}_heads",
        )
    return {stack: heads for stack, heads in known.items() if heads is not None}


def _stack(tensors: Mapping[str, np.ndarray], name: str, width: int, heads: int) -> TransformerConfig:
    key = "blocks" if name == "encoder" else "decoder_blocks"
    numbers = {int(found[1]) for name in tensors if (found := re.match(rf"{key}\.([0-9]{{1,18}})\.", name))}
    # As deep as the highest number: a block that is missing is then named. Where most are, the first is named alone.
    depth = 1 + max(numbers, default=-1)
    if depth > 2 * len(numbers):
        gap = next(number for number in range(depth) if number not in numbers)
        raise StatedError(
            f"{key}.{gap} is missing, and {key}.{depth - 1} is there: number the blocks from 0 on", field=f"{key}.{gap}"
        )
    some = next((n for i in range(depth) if (n := f"{key}.{i}.mlp.fc1.weight") in tensors), f"{key}.0.mlp.fc1.weight")
    hidden = _shape(tensors, some, 2)[0]
    try:
        return TransformerConfig(width, depth, heads, hidden / width)
    except ValueError as error:
        raise StatedError(f"{name}: {error}", field=f"{name}_heads") from error


def _image_size(patches: int, patch: tuple[int, int], given: Size | None) -> Size:
    if given is not None:
        height, width = (given, given) if isinstance(given, int) else given
        if height % patch[0] or width % patch[1] or (height // patch[0]) * (width // patch[1]) != patches:
            raise StatedError(
                f"image size {given} with patches of {patch} does not give the {patches} patches of pos_embed",
                field="source_image_size",
            )
        return height if height == width else (height, width)
    side = math.isqrt(patches)
    if side * side != patches:
        raise StatedError(
            f"pos_embed has {patches} patches, which is no square: give the size of the images that it was made for, "
            "--source-image-size HEIGHT WIDTH (in Python, source_image_size=)",
            field="source_image_size",
        )
    height, width = side * patch[0], side * patch[1]
    return height if height == width else (height, width)


def _positions(tensors: Mapping[str, np.ndarray], model: ModelConfig) -> Positions:
    """Find the frozen kind whose tables these are, or learned."""
    tables = {"pos_embed": model.encoder.width}
    if "decoder_pos_embed" in tensors:
        tables["decoder_pos_embed"] = model.decoder.width
    kinds: tuple[Positions, ...] = ("sincos2d", "sincos1d")
    # Looked at first: widths come from other tensors, and together they could claim a table of any size.
    if any(tensors[key].shape != (1, tensors["pos_embed"].shape[1], width) for key, width in tables.items()):
        return "learned"
    for kind in kinds:
        try:
            expected = {
                key: fixed_positions(kind, width, model.grid, model.class_token) for key, width in tables.items()
            }
        except ValueError:  # a width that this kind does not allow
            continue
        if all(is_table(tensors[key][0], table) for key, table in expected.items()):
            return kind
    return "learned"
