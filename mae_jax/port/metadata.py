"""What a checkpoint tells of itself beside its tensors: its arguments, config.json, preprocessor_config.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mae_jax.errors import StatedError
from mae_jax.port.infer_config import Hints

CONFIG = "config.json"
_PREPROCESSOR = "preprocessor_config.json"
_LARGEST = 3.4e38  # of float32; nan is not below it either


def said_in(folder: Path) -> dict[str, Any]:
    """What config.json says, and under `preprocessor` what preprocessor_config.json does.

    Raises:
      StatedError: one of them cannot be read.
    """
    return read_json(folder / CONFIG) | {"preprocessor": read_json(folder / _PREPROCESSOR)}


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

    path: the file that says it.

    Raises:
      StatedError: a value is of another type, or a number of heads is less than 1.
    """

    def first(*names: str) -> tuple[str, Any]:
        return next(((name, said[name]) for name in names if said.get(name) is not None), (names[0], None))

    def number(kind: Any, *names: str) -> Any:
        name, value = first(*names)
        if value is not None and not isinstance(value, kind):
            raise StatedError(f"{path} says {name} {value!r}, which is no {getattr(kind, '__name__', 'number')}")
        return value

    def heads(*names: str) -> Any:
        value = number(int, *names)
        if value is not None and (isinstance(value, bool) or value < 1):
            raise StatedError(f"{path} says {first(*names)[0]} {value!r}, which is no number of heads, 1 or more")
        return value

    name, size = first("image_size", "input_size")
    pair = isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(side, int) for side in size)
    if not (pair or isinstance(size, int | None)):
        raise StatedError(f"{path} says {name} {size!r}, which is not a side, nor height and width")
    return Hints(
        encoder_heads=heads("encoder_heads", "num_attention_heads"),
        decoder_heads=heads("decoder_heads", "decoder_num_attention_heads"),
        image_size=tuple(size) if isinstance(size, list) else size,
        mask_ratio=number(int | float, "mask_ratio"),
        norm_pix_loss=number(int, "norm_pix_loss"),  # True and False are ints, and some write 0 and 1
    )


def check_settings(said: Mapping[str, Any], path: Path, notes: list[str]) -> None:
    """Refuse or note the settings of a Hugging Face configuration that this project's model does not have.

    path: the file that says them.

    Raises:
      StatedError: hidden_act is another.
    """
    activation = said.get("hidden_act", "gelu")
    if activation != "gelu":
        raise StatedError(f"{path} says hidden_act {activation!r}; only the exact gelu is computed here")
    eps = said.get("layer_norm_eps", 1e-12 if said.get("model_type") == "vit_mae" else 1e-6)  # their default
    if eps != 1e-6:
        notes.append(f"config.json says layer_norm_eps {eps}; here LayerNorms have the authors' 1e-6")


def normalisation_in(
    arguments: Mapping[str, Any], file: Path, said: Mapping[str, Any], folder: Path, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation from the file itself, a preprocessor_config.json, or timm's config.json, if one has them.

    Args:
      arguments: What the file says beside its tensors.
      file: Is named where that cannot be.
      said: What `said_in` found beside the file.
      folder: In which it found it.
      channels: Of the images; lists of another length are passed over.

    Raises:
      StatedError: one of the lists holds what is no finite number, or a deviation that is not positive.
    """
    pretrained = said.get("pretrained_cfg") or {}
    if not isinstance(pretrained, Mapping):
        raise StatedError(f"{folder / CONFIG} says pretrained_cfg {pretrained!r}, which is no object: leave it out")
    sources: tuple[tuple[Path, Mapping[str, Any]], ...] = (
        (file, arguments),
        (folder / _PREPROCESSOR, said.get("preprocessor") or {}),
        (folder / CONFIG, pretrained),
    )
    for path, values in sources:
        for names in (("image_mean", "image_std"), ("mean", "std")):
            found: list[Any] = [values.get(name) for name in names]
            if all(isinstance(one, list) and len(one) == channels for one in found):
                _require_finite(found[0], names[0], path, -_LARGEST, "finite number")
                _require_finite(found[1], names[1], path, 0.0, "positive finite number")
                return tuple(found[0]), tuple(found[1])
    return None


def _require_finite(values: list[Any], name: str, path: Path, above: float, kind: str) -> None:
    for value in values:
        if not isinstance(value, int | float) or isinstance(value, bool) or not above < value < _LARGEST:
            raise StatedError(f"{path} says {name} {values!r}, of which {value!r} is no {kind}: correct it there")
