"""What a checkpoint tells of itself beside its tensors: its arguments, config.json, preprocessor_config.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mae_jax.errors import StatedError
from mae_jax.port.inference import Hints


def said_in(folder: Path) -> dict[str, Any]:
    """What config.json says, and under `preprocessor` what preprocessor_config.json does.

    Raises:
      StatedError: one of them cannot be read.
    """
    return read_json(folder / "config.json") | {"preprocessor": read_json(folder / "preprocessor_config.json")}


def read_json(path: Path) -> dict[str, Any]:
    """A file's object; {} where there is no file.

    Raises:
      StatedError: it is not JSON, or no object.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StatedError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise StatedError(f"{path} holds {type(values).__name__}, not a configuration")
    return values


def hints_in(said: Mapping[str, Any], path: Path) -> Hints:
    """What arguments or a config.json say, under the names of the authors, of Hugging Face or of this project.

    Raises:
      StatedError: a value is of another type.
    """

    def first(*names: str) -> Any:
        return next((said[name] for name in names if said.get(name) is not None), None)

    def number(kind: Any, *names: str) -> Any:
        value = first(*names)
        if value is not None and not isinstance(value, kind):
            raise StatedError(f"{path} says {names[0]} {value!r}, which is no {getattr(kind, '__name__', 'number')}")
        return value

    size = first("image_size", "input_size")
    if isinstance(size, list | tuple) and not (len(size) == 2 and all(isinstance(side, int) for side in size)):
        raise StatedError(f"{path} says image_size {size!r}, which is not a side, nor height and width")
    if not isinstance(size, list | tuple | int | None):
        raise StatedError(f"{path} says image_size {size!r}, which is not a side, nor height and width")
    return Hints(
        encoder_heads=number(int, "encoder_heads", "num_attention_heads"),
        decoder_heads=number(int, "decoder_heads", "decoder_num_attention_heads"),
        image_size=tuple(size) if isinstance(size, list) else size,
        mask_ratio=number(int | float, "mask_ratio"),
        norm_pix_loss=number(int, "norm_pix_loss"),  # True and False are ints, and some write 0 and 1
    )


def check_settings(said: Mapping[str, Any], path: Path, notes: list[str]) -> None:
    """Refuse or note the settings of a Hugging Face configuration that this project's model does not have.

    Raises:
      StatedError: hidden_act is another.
    """
    activation = said.get("hidden_act", "gelu")
    if activation != "gelu":
        raise StatedError(f"{path}: config.json says hidden_act {activation!r}; only the exact gelu is computed here")
    eps = said.get("layer_norm_eps", 1e-12 if said.get("model_type") == "vit_mae" else 1e-6)  # their default
    if eps != 1e-6:
        notes.append(f"config.json says layer_norm_eps {eps}; here LayerNorms have the authors' 1e-6")


def normalisation_in(
    arguments: Mapping[str, Any], said: Mapping[str, Any], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation from the file itself, a preprocessor_config.json, or timm's config.json, if one has them."""
    values: Mapping[str, Any]
    for values in (arguments, said.get("preprocessor") or {}, said.get("pretrained_cfg") or {}):
        for names in (("image_mean", "image_std"), ("mean", "std")):
            found: list[Any] = [values.get(name) for name in names]
            if all(isinstance(one, list) and len(one) == channels for one in found):
                return tuple(found[0]), tuple(found[1])
    return None
