"""Writing: `Weights` to a file or folder in a library's own layout."""

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np

from mae_jax.config import AugmentConfig, ModelConfig, PretrainConfig
from mae_jax.errors import StatedError
from mae_jax.files import local_path, sync, sync_tree
from mae_jax.models import Params
from mae_jax.port.formats import Format, file_in, is_folder, require_expressible
from mae_jax.port.keys import Config, Part, Tensors, encoder_config, to_fair
from mae_jax.port.layouts import to_layout, written
from mae_jax.port.tensors import SAFETENSORS, write_safetensors, write_torch
from mae_jax.port.weights import Weights, default_normalisation
from mae_jax.storage.checkpoints import save_params

FileDtype = Literal["float32", "float16", "bfloat16"]
_DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# All that a port puts into a folder: --force replaces folders that hold nothing else.
PORTED_NAMES = frozenset(
    {
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
        "checkpoint.pth",
        "state",
        "record",
        "_CHECKPOINT_METADATA",
        "commit_success.txt",
    }
)
_BICUBIC = 3  # Pillow's number, in a preprocessor_config.json


def save_torch(
    params: Params,
    config: Config,
    destination: str | Path,
    *,
    layout: Format,
    part: Part = "all",
    dtype: FileDtype = "float32",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    force: bool = False,
) -> Path:
    """Write parameters in the layout of a PyTorch library; nothing is compared (`mae-jax port` does that).

    Args:
      params: Of `MaskedAutoencoder`, or of `Classifier` with a `ClassifierConfig`.
      config: Theirs.
      destination: A folder for huggingface; for the others a file (.pth, or .safetensors where the library reads
        them), or a folder to put one into.
      layout: fair, timm, huggingface, lightly, lightly-deprecated.
      part: encoder leaves the decoder out.
      dtype: Of the file.
      mean: Of channels, for Hugging Face's image processor; ImageNet's by default.
      std: Likewise.
      force: Replace what is there.

    Returns:
      The destination.

    Raises:
      StatedError: it exists, cannot be written, or the layout cannot express the model.
    """
    defaults = default_normalisation(encoder_config(config).in_channels)
    weights = Weights(
        config,
        jax.tree.map(np.asarray, params),
        part,
        mean or defaults[0],
        std or defaults[1],
        "parameters",
        normalisation_known=mean is not None and std is not None,
    )
    destination = Path(destination)
    require_expressible(config, layout, part)
    with beside(destination, force) as fresh:
        write(weights, fresh, destination, to=layout, part=part, dtype=dtype)
    return destination


def write(
    weights: Weights, path: Path, destination: Path, *, to: Format, part: Part, dtype: FileDtype = "float32"
) -> None:
    """Write a model that the format can express to a path that is not there yet.

    destination: where it is moved from there, which is named when it cannot be written.

    Raises:
      StatedError: the parameters do not fit the configuration, or the disk is full.
    """
    size = 0
    try:
        if to == "jax":
            params = weights.params if part == "all" else {"encoder": weights.params["encoder"]}
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
            _write_jax(weights, path, params)
            return
        try:
            tensors = _tensors(weights, to, part)
        except ValueError as error:
            raise StatedError(str(error), field="params") from error
        tensors = {key: values.astype(_DTYPES[dtype]) for key, values in tensors.items()}
        size = sum(values.nbytes for values in tensors.values())
        folder = is_folder(path, to)
        if folder:
            path.mkdir()
        file = file_in(path, to) if folder else path
        arguments = _arguments(weights, part)
        if file.suffix == SAFETENSORS:
            write_safetensors(file, tensors, arguments)
        else:
            write_torch(file, tensors, arguments if to == "fair" else None)
        if to == "huggingface":
            assert weights.config.kind == "mae"  # no other is expressible
            for name, values in {
                "config.json": hugging_face_config(weights.config, part, dtype),
                "preprocessor_config.json": hugging_face_processor(weights),
            }.items():
                (path / name).write_text(json.dumps(values, indent=2) + "\n")
    except (OSError, RuntimeError) as error:  # torch and safetensors raise their own for a full disk
        if isinstance(error, StatedError):
            raise
        reason = _why_not_written(error, path.parent, size)
        raise StatedError(f"{destination} cannot be written: {reason}", field="destination") from error


def _why_not_written(error: Exception, folder: Path, size: int) -> str:
    """Explain why files of so many bytes could not be written: torch does not name a full disk."""
    half = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())  # removed on the way out
    free = shutil.disk_usage(folder).free + half
    if free < size:
        return (
            f"it takes {size / 2**20:.1f} MiB, and its disk has room for {free / 2**20:.1f} MiB. "
            "Make room, or choose a destination on another disk"
        )
    return getattr(error, "strerror", None) or str(error)


def _tensors(weights: Weights, to: Format, part: Part) -> Tensors:
    """Return every tensor that the format holds, under its names."""
    assert to != "jax"
    if to == "timm" and weights.config.kind == "mae":
        part = "encoder"
    tensors = to_fair(weights.params, weights.config, part)
    tensors.pop("encoder_mask_token", None)  # an encoder that sees every patch does not use it
    renamed = to_layout(tensors, written(to))
    if to == "huggingface" and part == "encoder":
        return {key.removeprefix("vit."): values for key, values in renamed.items()}
    if to.startswith("lightly"):
        # Their encoder has a mask token of its own, which is not used where hidden patches are dropped.
        width = encoder_config(weights.config).encoder.width
        renamed["backbone.mask_token"] = np.zeros((1, 1, width), np.float32)
    return renamed


def _arguments(weights: Weights, part: Part) -> dict[str, Any]:
    """Return what is in no tensor, for whoever reads the file here again."""
    config, model = weights.config, encoder_config(weights.config)
    arguments: dict[str, Any] = {
        "encoder_heads": model.encoder.heads,
        "image_size": model.image_size if isinstance(model.image_size, int) else list(model.image_size),
    }
    if config.kind == "mae" and part == "all":
        arguments |= {
            "decoder_heads": model.decoder.heads,
            "mask_ratio": model.mask_ratio,
            "norm_pix_loss": model.norm_pix_loss,
        }
    if weights.normalisation_known:
        arguments |= {"image_mean": list(weights.mean), "image_std": list(weights.std)}
    return arguments


def hugging_face_config(model: ModelConfig, part: Part, dtype: FileDtype) -> Mapping[str, Any]:
    """Return config.json of a ViTMAE model, with the authors' eps of LayerNorms: the library's default is 1e-12."""
    encoder, decoder = model.encoder, model.decoder
    return {
        "architectures": ["ViTMAEForPreTraining" if part == "all" else "ViTMAEModel"],
        "model_type": "vit_mae",
        "torch_dtype": dtype,
        "image_size": model.image_hw[0],
        "patch_size": model.patch_hw[0],
        "num_channels": model.in_channels,
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "intermediate_size": encoder.mlp_width,
        "decoder_hidden_size": decoder.width,
        "decoder_num_hidden_layers": decoder.depth,
        "decoder_num_attention_heads": decoder.heads,
        "decoder_intermediate_size": decoder.mlp_width,
        "mask_ratio": model.mask_ratio,
        "norm_pix_loss": model.norm_pix_loss,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
    }


def hugging_face_processor(weights: Weights) -> Mapping[str, Any]:
    """Return preprocessor_config.json: resized to the model's size, bytes to 0 .. 1, normalised as in training."""
    height, width = encoder_config(weights.config).image_hw
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(weights.mean),
        "image_std": list(weights.std),
    }


def _write_jax(weights: Weights, path: Path, params: Params) -> None:
    """Write a checkpoint of this project without optimizer state, which every command reads."""
    assert weights.config.kind == "mae"  # no other is expressible
    augment = AugmentConfig(mean=weights.mean, std=weights.std)
    try:
        save_params(path, PretrainConfig(model=weights.config, augment=augment), params)
    except BaseException as error:
        _remove_until_gone(path)
        if isinstance(error, ValueError):  # Orbax's, for what the operating system refuses
            raise OSError(str(error)) from error
        raise


def _remove_until_gone(path: Path) -> None:
    """Remove what a failed save left: threads of TensorStore go on for a moment, and make its folders anew."""
    last_seen = start = time.monotonic()
    while time.monotonic() - last_seen < 0.5 and time.monotonic() - start < 10:
        for left in path.parent.glob(f"{path.name}*"):
            shutil.rmtree(left, ignore_errors=True)
            last_seen = time.monotonic()
        time.sleep(0.02)


@contextlib.contextmanager
def beside(destination: Path, force: bool) -> Iterator[Path]:
    """Give a path beside the destination to write to; it is moved into place if all goes well, else removed.

    What is moved is on the disk then. It is a file or a folder, as the format has it, and may replace either.

    Raises:
      StatedError: the destination exists and `force` is not given, holds other things than a port, or its folder
        cannot be written to.
    """
    destination = local_path(destination, "destination")
    require_replaceable(destination, force)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        folder = destination.parent / f".{destination.name}.{uuid.uuid4().hex[:8]}"
        folder.mkdir()
    except OSError as error:
        raise StatedError(
            f"{destination.parent} cannot be written to: {error.strerror}", field="destination"
        ) from error
    old, fresh = folder / "old", folder / destination.name
    try:
        yield fresh
        sync_tree(folder)
        require_replaceable(destination, force)  # once more: it may have come, or changed, in the meantime
        if os.path.lexists(destination):
            os.replace(destination, old)  # a folder cannot be moved onto another
        os.replace(fresh, destination)
        sync(destination.parent)  # before the old one is removed: a power cut leaves one of the two
    finally:
        if os.path.lexists(old) and not os.path.lexists(destination):
            os.replace(old, destination)
        shutil.rmtree(folder, ignore_errors=True)


def require_replaceable(destination: Path, force: bool) -> None:
    """Refuse a destination that must not be replaced.

    Raises:
      StatedError: the destination is an address, exists and `force` is not given, or holds other things than a port.
    """
    if not os.path.lexists(local_path(destination, "destination")):
        return
    if not force:
        raise StatedError(f"{destination} exists; --force replaces it", field="destination")
    if destination.is_dir():
        others = sorted(child.name for child in destination.iterdir() if child.name not in PORTED_NAMES)
        if others:
            raise StatedError(
                f"{destination} holds other things than a ported model ({', '.join(others[:5])}) and is not replaced: "
                "choose another folder, or remove it",
                field="destination",
            )
