"""Read a PyTorch file, a Hugging Face folder, a run of this project, or a repository on the hub, to `Weights`."""

import logging
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from mae_jax.config import Dtype, FinetuneConfig, Run, Size, wide
from mae_jax.errors import StatedError, shown, shown_name
from mae_jax.models import Params
from mae_jax.port.infer_config import Hints, infer_config
from mae_jax.port.keys import Config, Part, Tensors, encoder_config, from_fair
from mae_jax.port.layouts import Layout, detect, from_layout, in_decoder
from mae_jax.port.metadata import CONFIG, check_architecture, hints_in, metadata_beside, normalisation_in, read_json
from mae_jax.port.tensors import Contents, read_file
from mae_jax.port.weights import Weights, default_normalisation, for_image_size
from mae_jax.storage.loading import load_any
from mae_jax.train.classification import BATCH_NORM_EPS, fold_batch_norm

_WANTED = ("config.json", "preprocessor_config.json")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def download(repository: str) -> Path:
    """Download configuration and weights of a repository OWNER/NAME; return its folder in the hub's cache.

    Raises:
      StatedError: huggingface_hub is not installed, there is no network, or the repository holds no weights.
    """
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise StatedError(f"hf:{repository} is not hf:OWNER/NAME", field="source")
    by_hand = (
        f"Download config.json and model.safetensors (or pytorch_model.bin) from "
        f"https://huggingface.co/{repository} into a folder, and give that folder instead of hf:{repository}"
    )
    try:
        from huggingface_hub import hf_hub_download  # noqa: PLC0415  (only for hf:, and optional)
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise StatedError(
            f"hf: needs huggingface_hub (pip install huggingface_hub). Or: {by_hand}", field="huggingface_hub"
        ) from error

    def fetch(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repository, name))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None

    def fetch_if_there(name: str) -> Path | None:
        try:
            return fetch(name)
        except LocalEntryNotFoundError:  # without a network, and not in the cache: the weights may be
            return None

    # It logs its retries line by line; what came of them is stated below.
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        files = [file for name in _WANTED if (file := fetch_if_there(name))]
        weights = next((file for name in _WEIGHTS if (file := fetch(name))), None)
    except Exception as error:  # whatever its network layers raise
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise StatedError(f"hf:{repository} cannot be downloaded ({reason}). {by_hand}", field="source") from error
    finally:
        logger.setLevel(level)
    if weights is None:
        raise StatedError(
            f"hf:{repository} has neither {' nor '.join(_WEIGHTS)} (it has: {len(files)} of {_WANTED})", field="source"
        )
    return weights.parent


# The files of a folder that may hold its weights, the first that is there.
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "checkpoint.pth")
_INDEX = "model.safetensors.index.json"  # of weights in several files


def load_torch(
    source: str | Path,
    *,
    encoder_heads: int | None = None,
    decoder_heads: int | None = None,
    image_size: Size | None = None,
    source_image_size: Size | None = None,
    mask_ratio: float | None = None,
    norm_pix_loss: bool | None = None,
    dtype: Dtype = "float32",
) -> tuple[Config, Params]:
    """Load configuration and parameters of a PyTorch checkpoint, in any layout that `mae-jax port` reads.

    `ModelConfig` and the parameters of `MaskedAutoencoder` (of its encoder alone, where the file has no decoder); of a
    fine-tuned file `ClassifierConfig` and the parameters of `Classifier`. What is not in the file is to be given:

    Args:
      source: A file, a folder, or hf:OWNER/NAME.
      encoder_heads: Attention heads; known for the published widths.
      decoder_heads: The decoder's.
      image_size: Of the images to come; sin-cos positions are recomputed, learned ones resized. By default the file's.
      source_image_size: What the file's positions were made for, where they are not those of a square. Neither this nor
        heads are taken for a run of this project, which knows them.
      mask_ratio: By default what the file has, or 0.75.
      norm_pix_loss: By default what the file has, or False.
      dtype: Of the configuration; float64 makes the parameters float64, they are float32 otherwise.

    Raises:
      StatedError: it cannot be read, or is no masked autoencoder.
    """
    if dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise StatedError('dtype float64 needs jax.config.update("jax_enable_x64", True) first', field="dtype")
    hints = Hints(encoder_heads, decoder_heads, source_image_size, mask_ratio, norm_pix_loss)
    weights = read_weights(source, hints, image_size=image_size, dtype=dtype)
    # Copied: the arrays read are views of the file, which may be written anew while they are in use.
    return weights.config, jax.tree.map(jax.numpy.array, weights.params)


def read_weights(
    source: str | Path,
    hints: Hints | None = None,
    *,
    fallback: Hints | None = None,
    image_size: Size | None = None,
    dtype: Dtype = "float32",
) -> Weights:
    """Read a source; `hints` go before its own metadata, and that before `fallback`.

    Raises:
      StatedError: it cannot be read, or is no masked autoencoder.
    """
    path = download(str(source).removeprefix("hf:")) if str(source).startswith("hf:") else Path(source)
    hints = hints or Hints()
    if not path.exists():
        raise StatedError(f"{source} does not exist", field="source")
    weights = _from_run(path, hints) if is_run(path) else _from_torch(path, hints, fallback or Hints(), dtype)
    return weights if image_size is None else for_image_size(weights, image_size)


def is_run(source: str | Path) -> bool:
    """Return whether a source is a run of this project or one of its checkpoints."""
    path = Path(source)
    return path.is_dir() and any((path / name).is_dir() for name in ("record", "checkpoints"))


def _from_run(path: Path, hints: Hints) -> Weights:
    config, params, step = load_any(path)
    require_applicable(hints, config, path)
    if config.kind == "classification":
        return _from_classifier(path, config, params, step)
    model = config.model
    changes = {name: value for name in ("mask_ratio", "norm_pix_loss") if (value := getattr(hints, name)) is not None}
    try:
        model = replace(model, **changes)
    except ValueError as error:
        raise StatedError(str(error), field=next(iter(changes))) from error
    return Weights(
        model,
        jax.tree.map(np.asarray, params),
        "all" if "decoder" in params else "encoder",
        config.augment.mean,
        config.augment.std,
        f"run at step {step}",
        notes=_averaged(config),
    )


def require_applicable(hints: Hints, config: Run, path: Path) -> None:
    """Refuse hints for a run that knows what they give, or has no such thing."""
    names = {"encoder_heads": "encoder_heads", "decoder_heads": "decoder_heads", "image_size": "source_image_size"}
    why = "knows its own sizes"
    if config.kind == "classification":
        names |= {"mask_ratio": "mask_ratio", "norm_pix_loss": "norm_pix_loss"}
        why += ", and hides no patches"
    given = {names[name]: value for name, value in vars(hints).items() if name in names and value is not None}
    if given:
        flags = " and ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
        raise StatedError(
            f"{path} is a run of this project, which {why}: leave out {flags} (in Python {', '.join(given)})",
            field=next(iter(given)),
        )


def _averaged(config: Run) -> tuple[str, ...]:
    return () if config.optim.ema_decay is None else ("the running average of the parameters is taken",)


def _from_classifier(path: Path, config: FinetuneConfig, params: Params, step: int) -> Weights:
    """Read a fine-tuned or probed run; a BatchNorm in front of the head is put into the head."""
    if config.sweep:
        raise StatedError(
            f"{path} holds the heads of a sweep over {len(config.sweep)} rates: give its folder best", field="source"
        )
    normed = ("the probe's BatchNorm is put into its head",) if config.batch_norm else ()
    return Weights(
        config.classifier,
        jax.tree.map(np.asarray, fold_batch_norm(params)),
        "all",
        config.augment.mean,
        config.augment.std,
        f"classifier at step {step}",
        notes=(*_averaged(config), *normed),
    )


def _from_torch(path: Path, hints: Hints, fallback: Hints, dtype: Dtype) -> Weights:
    if path.is_dir():
        folder, file = path, _weights_in(path)
        beside = metadata_beside(folder)
        contents = _read_parts(file) if file.name == _INDEX else read_file(file)
    else:
        folder, file = path.parent, path
        contents, beside = read_file(file), metadata_beside(folder) if file.name in _WEIGHT_FILES else {}
    try:
        found = detect(contents.tensors)
    except StatedError as error:
        raise StatedError(f"{path}: {error}", field=error.field) from error
    if found is None:
        raise StatedError(
            f"{path} holds no masked autoencoder that is known here (its keys begin: {_first_names(contents.tensors)})",
            field="source",
        )
    layout, prefix = found
    notes = [f"left out: {_first_names(contents.left)}"] if contents.left else []
    tensors = _strip(contents.tensors, prefix, layout, notes)
    known = hints_in(contents.arguments, file).over(hints_in(beside, folder / CONFIG))
    for name in ("encoder_heads", "decoder_heads"):
        asked, written = getattr(hints, name), getattr(known, name)
        if None not in (asked, written) and asked != written:
            raise StatedError(f"{path} has {name} {written}, and {asked} is asked for: leave it out", field=name)
    given = hints.over(known).over(fallback)
    check_architecture(beside, folder / CONFIG, notes)
    if given.norm_pix_loss is None and any(in_decoder(key) for key in _named(tensors, layout)):
        notes.append(
            "whether targets were normalised pixels is not in the file; taken as plain (norm_pix_loss states it)"
        )
    try:
        named = _unprobed(_named(tensors, layout), notes)
        config = infer_config(named, given, dtype)
        part: Part = "encoder" if config.kind == "mae" and not any(map(in_decoder, named)) else "all"
        used = named if layout.name == "fair" else tensors
        fair = from_layout(used, layout, config, part)
        _require_floating(used)
        params = from_fair(fair, config, part)
    except StatedError as error:
        raise StatedError(f"{path}: {error}", field=error.field) from error
    except ValueError as error:
        where = f"{layout.name}, under {shown_name(prefix)}" if prefix else layout.name
        raise StatedError(f"{path} ({where}): {error}", field="source") from error
    channels = encoder_config(config).in_channels
    normalisation = normalisation_in(contents.arguments, file, beside, folder, channels)
    mean, std = normalisation or default_normalisation(channels)
    parameter_dtype = np.dtype(wide(dtype))
    return Weights(
        config,
        jax.tree.map(lambda values: np.asarray(values, parameter_dtype), params),
        part,
        mean,
        std,
        layout.name if part == "all" else f"{layout.name}, encoder alone",
        fair,
        tuple(notes),
        normalisation_known=normalisation is not None,
    )


def _strip(tensors: Tensors, prefix: str, layout: Layout, notes: list[str]) -> Tensors:
    """Return the model's own tensors, without what stands before their names; others are noted."""
    own = {key.removeprefix(prefix): values for key, values in tensors.items() if key.startswith(prefix)}
    unused = {key for key in own if re.fullmatch(layout.unused, key)}
    others = [key for key in tensors if not key.startswith(prefix)] + [key for key in own if key in unused]
    if others:
        notes.append(f"left out: {len(others)} tensors that the model does not use ({_first_names(others)})")
    return {key: values for key, values in own.items() if key not in unused}


def _first_names(names: Iterable[str]) -> str:
    first = [shown_name(name) for name, _ in zip(names, range(5), strict=False)]
    return ", ".join(first[:4]) + (" ..." if len(first) > 4 else "")


def _named(tensors: Tensors, layout: Layout) -> Tensors:
    """Return the tensors that show the configuration, by the authors' names, as far as they are there."""
    if layout.name == "fair":
        return tensors
    keys = [
        "patch_embed.proj.weight",
        "cls_token",
        "pos_embed",
        "mask_token",
        "decoder_embed.weight",
        "decoder_pos_embed",
    ]
    for blocks in ("blocks", "decoder_blocks"):
        depth = 0
        gap = 0  # a block may be missing, which is then named
        while gap < 2:
            found = [
                key
                for key in (f"{blocks}.{depth}.norm1.weight", f"{blocks}.{depth}.mlp.fc1.weight")
                if layout.rename(key)[0] in tensors
            ]
            keys += found
            gap = 0 if found else gap + 1
            depth += 1
    return {key: tensors[layout.rename(key)[0]] for key in keys if layout.rename(key)[0] in tensors}


def _unprobed(tensors: Tensors, notes: list[str]) -> Tensors:
    """Fold the BatchNorm before a linear probe's head into it: the same logits from one product.

    Raises:
      StatedError: a part of them is missing, or they do not fit each other.
    """
    if "head.0.running_mean" not in tensors or "head.1.weight" not in tensors:
        return tensors
    missing = [key for key in ("head.0.running_var", "head.1.bias") if key not in tensors]
    if missing:
        raise StatedError(
            f"{' and '.join(missing)} missing, beside head.0.running_mean: save the whole head", field=missing[0]
        )
    shape = tensors["head.1.weight"].shape
    for key, expected in {
        "head.0.running_mean": shape[1:],
        "head.0.running_var": shape[1:],
        "head.1.bias": shape[:1],
    }.items():
        if len(shape) != 2 or tensors[key].shape != expected:
            raise StatedError(f"{key} has shape {shown(tensors[key].shape)}, head.1.weight {shown(shape)}", field=key)
    scale = 1 / np.sqrt(tensors["head.0.running_var"].astype(np.float64) + BATCH_NORM_EPS)
    weight = tensors["head.1.weight"] * scale
    folded = {
        "head.weight": weight.astype(np.float32),
        "head.bias": (tensors["head.1.bias"] - weight @ tensors["head.0.running_mean"]).astype(np.float32),
    }
    notes.append("the BatchNorm in front of the linear head is folded into it")
    return {key: values for key, values in tensors.items() if not key.startswith("head.")} | folded


def _require_floating(tensors: Tensors) -> None:
    for key, values in tensors.items():
        if not jax.numpy.issubdtype(values.dtype, np.floating):  # NumPy's does not know bfloat16
            raise StatedError(f"{key} is {values.dtype}, where a weight is floating: save it as float32", field=key)


def _weights_in(folder: Path) -> Path:
    """Find the file in a folder that holds its weights, or names those that do."""
    names = (*_WEIGHT_FILES, _INDEX)
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise StatedError(f"{folder} holds no weights ({', '.join(names)}) and is no run", field="source")
    return found


def _read_parts(index: Path) -> Contents:
    """Read the weights in the files that an index names, which must lie beside it."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(_is_file_name(name) for name in places.values()):
        raise StatedError(f"{index} names no files of this folder under weight_map", field="weight_map")
    parts = sorted(set(places.values()))
    tensors = {key: values for name in parts for key, values in read_file(index.parent / name).tensors.items()}
    return Contents(tensors, {})


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", "..") and name.isprintable() and Path(name).name == name
