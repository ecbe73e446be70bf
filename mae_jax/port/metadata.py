"""What a checkpoint holds beside its tensors: its arguments, config.json, preprocessor_config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mae_jax import files
from mae_jax.errors import StatedError, shown
from mae_jax.port.infer_config import Hints

CONFIG = "config.json"
_PREPROCESSOR = "preprocessor_config.json"
_MOST_BYTES = 4 << 20  # of such a file; they have thousands, and Python's objects take up to thirty times as much
_LARGEST = 3.4e38  # of float32; nan is not below it either
_LARGEST_COUNT = 2**31  # of heads and pixels


def metadata_beside(folder: Path) -> dict[str, Any]:
    """Return what config.json holds, and under `preprocessor` what preprocessor_config.json does.

    Raises:
      StatedError: one of them cannot be read.
    """
    return read_json(folder / CONFIG) | {"preprocessor": read_json(folder / _PREPROCESSOR)}


def read_json(path: Path) -> dict[str, Any]:
    """Read a file's object; {} where there is no file.

    Raises:
      StatedError: it cannot be read, is no JSON, or no object; its field is the file's name.
    """
    if not path.is_file():
        return {}
    try:
        values = files.read_json(path, path.name, _MOST_BYTES)
    except OSError as error:
        raise StatedError(f"{path} cannot be read: {error.strerror}", field=path.name) from error
    if not isinstance(values, dict):
        raise StatedError(f"{path} holds {type(values).__name__}, not a configuration", field=path.name)
    return values


def hints_in(metadata: Mapping[str, Any], path: Path) -> Hints:
    """Return the hints among arguments or in a config.json, by the names of the authors, Hugging Face or this project.

    path: the file that holds them.

    Raises:
      StatedError: a value is of another type, or a number is out of all bounds; its field is the value's name.
    """

    def first(*names: str) -> tuple[str, Any]:
        return next(((name, metadata[name]) for name in names if metadata.get(name) is not None), (names[0], None))

    def count(what: str, *names: str) -> int | None:
        name, value = first(*names)
        if value is not None and not _is_count(value):
            raise _unusable(path, name, value, f"no {what}, 1 or more")
        return value

    size_name, size = first("image_size", "input_size")
    sides = size if isinstance(size, list | tuple) and len(size) == 2 else [size]
    if size is not None and not all(_is_count(side) for side in sides):
        raise _unusable(path, size_name, size, "not a side, nor height and width")
    ratio_name, ratio = first("mask_ratio")
    if ratio is not None and not _is_number(ratio):
        raise _unusable(path, ratio_name, ratio, "no number")
    norm_name, norm = first("norm_pix_loss")
    if not isinstance(norm, int | None):  # True and False are ints, and some write 0 and 1
        raise _unusable(path, norm_name, norm, "neither true nor false")
    return Hints(
        encoder_heads=count("number of heads", "encoder_heads", "num_attention_heads"),
        decoder_heads=count("number of heads", "decoder_heads", "decoder_num_attention_heads"),
        image_size=tuple(size) if isinstance(size, list) else size,
        mask_ratio=ratio,
        norm_pix_loss=None if norm is None else bool(norm),
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < _LARGEST_COUNT


def _is_number(value: Any, above: float = -_LARGEST) -> bool:
    """Return whether a value is a finite number, no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and above < value < _LARGEST


def _unusable(path: Path, name: str, value: Any, what: str) -> StatedError:
    return StatedError(f"{path} has {name} {shown(value)}, which is {what}: correct it there", field=name)


def check_architecture(metadata: Mapping[str, Any], path: Path, notes: list[str]) -> None:
    """Refuse or note the choices of a Hugging Face configuration that this project's model does not have.

    path: the file that holds them.

    Raises:
      StatedError: hidden_act is another.
    """
    activation = metadata.get("hidden_act", "gelu")
    if activation != "gelu":
        raise StatedError(
            f"{path} has hidden_act {shown(activation)}; only the exact gelu is computed here", field="hidden_act"
        )
    eps = metadata.get("layer_norm_eps", 1e-12 if metadata.get("model_type") == "vit_mae" else 1e-6)  # their default
    if eps != 1e-6:
        notes.append(f"config.json has layer_norm_eps {shown(eps)}; here LayerNorms have the authors' 1e-6")


def normalisation_in(
    arguments: Mapping[str, Any], file: Path, metadata: Mapping[str, Any], folder: Path, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and deviation from the file itself, a preprocessor_config.json, or timm's config.json.

    Args:
      arguments: What the file holds beside its tensors.
      file: Is named where that cannot be.
      metadata: What `metadata_beside` found beside the file.
      folder: In which it found it.
      channels: Of the images; lists of another length are passed over.

    Raises:
      StatedError: one of the lists holds what is no finite number, or a deviation that is not positive.
    """
    pretrained = metadata.get("pretrained_cfg") or {}
    if not isinstance(pretrained, Mapping):
        raise StatedError(
            f"{folder / CONFIG} has pretrained_cfg {shown(pretrained)}, which is no object: leave it out",
            field="pretrained_cfg",
        )
    sources: tuple[tuple[Path, Mapping[str, Any]], ...] = (
        (file, arguments),
        (folder / _PREPROCESSOR, metadata.get("preprocessor") or {}),
        (folder / CONFIG, pretrained),
    )
    for path, values in sources:
        for names in (("image_mean", "image_std"), ("mean", "std")):
            mean, std = (values.get(name) for name in names)
            if all(isinstance(one, list) and len(one) == channels for one in (mean, std)):
                _require_finite(mean, names[0], path, -_LARGEST, "finite number")
                _require_finite(std, names[1], path, 0.0, "positive finite number")
                return tuple(mean or ()), tuple(std or ())
    return None


def _require_finite(values: Any, name: str, path: Path, above: float, kind: str) -> None:
    for value in values:
        if not _is_number(value, above):
            raise StatedError(
                f"{path} has {name} {shown(values)}, of which {shown(value)} is no {kind}: correct it there", field=name
            )
