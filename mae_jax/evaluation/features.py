"""Features of whole images, where no patch is hidden, and the files that hold them."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from mae_jax.config import AugmentConfig, ModelConfig, Pooling, wide
from mae_jax.data.evaluation import evaluation_batches
from mae_jax.data.sources.source import Source
from mae_jax.errors import StatedError
from mae_jax.files import check_place, whole
from mae_jax.models import Params
from mae_jax.models.blocks import LayerNorm, Tokens
from mae_jax.models.mae import Encoder, all_visible
from mae_jax.train.objective import normalise_images

# What must be the same of two files whose features are compared.
_SAME = ("source", "step", "pooling", "block")


class FeatureFile(NamedTuple):
    """The arrays of a file, none of them pickled; row i of each is the i-th image that decodes."""

    features: Float[np.ndarray, "images width"]  # float32
    labels: Int[np.ndarray, " images"]  # index into class_names, -1 where there is no class
    class_names: tuple[str, ...]
    names: tuple[str, ...]  # of the images' files
    of: dict[str, Any]  # source, step, pooling, block (None: after the last LayerNorm), data, split


def check_writable(path: Path) -> None:
    """Refuse, before anything is computed, a path that no file of features can be written to.

    Raises:
      StatedError: it does not end in .npz, or its folder is not there or cannot be written to.
    """
    if path.suffix != ".npz":
        raise StatedError(f"out {path} does not end in .npz", field="out")
    check_place(path)


def save_features(path: Path, found: FeatureFile) -> None:
    """Write a file of features, whole or not at all.

    Raises:
      StatedError: it cannot be written.
    """
    check_writable(path)
    try:
        with whole(path) as beside:
            np.savez(
                beside,
                features=found.features,
                labels=found.labels,
                class_names=np.array(found.class_names, np.str_),
                names=np.array(found.names, np.str_),
                of=np.array(json.dumps(found.of)),
            )
    except OSError as error:
        raise StatedError(f"out {path} cannot be written: {error.strerror or error}", field="out") from error


def load_features(path: Path) -> FeatureFile:
    """Read a file of features; nothing in it is executed.

    Raises:
      StatedError: it cannot be read, or is not what `mae-jax features` writes.
    """
    try:
        # Opened here: numpy leaves a file that it cannot read open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            missing = [name for name in FeatureFile._fields if name not in stored]
            if missing:
                raise StatedError(f"{path} has no array {missing}: give a file of `mae-jax features`", field=missing[0])
            features, labels, class_names, names, of = (stored[name] for name in FeatureFile._fields)
        about = json.loads(str(of))
    except OSError as error:
        raise StatedError(f"{path} cannot be read: {error.strerror or error}", field=path.name) from error
    except StatedError:
        raise
    except Exception as error:  # whatever a damaged file makes NumPy and its layers raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        if "allow_pickle" in reason:  # NumPy's advice, for whatever it does not know
            reason = "it is no .npz, or holds Python objects, which are not read"
        raise StatedError(f"{path} is damaged, or no file of features: {reason}", field=path.name) from error
    found = FeatureFile(features, labels, tuple(map(str, class_names.ravel())), tuple(map(str, names.ravel())), about)
    _check(path, found)
    return found


def _check(path: Path, found: FeatureFile) -> None:
    """Refuse arrays that are not those of a file of features."""

    def wrong(field: str, text: str) -> StatedError:
        return StatedError(f"{path}: {field} {text}", field=field)

    features, labels, classes = found.features, found.labels, len(found.class_names)
    if features.ndim != 2 or features.dtype != np.float32:
        raise wrong("features", f"are {features.dtype} {features.shape}, not float32 (images, width)")
    if labels.shape != features.shape[:1] or labels.dtype.kind != "i":
        raise wrong("labels", f"are {labels.dtype} {labels.shape}, not one whole number for each of {len(features)}")
    if len(found.names) != len(features):
        raise wrong("names", f"are {len(found.names)}, of {len(features)} images")
    if labels.size and not -1 <= labels.min() <= labels.max() < classes:
        raise wrong("labels", f"{labels.min()} .. {labels.max()} are not those of {classes} classes")
    if not isinstance(found.of, dict):
        raise wrong("of", f"is {str(found.of)[:80]}, not an object with the features' origin")


def check_alike(first: Path, one: FeatureFile, second: Path, other: FeatureFile) -> None:
    """Refuse to compare features of two kinds.

    Raises:
      StatedError: they come from different encoders, or from different places in one.
    """
    pairs = [(name, one.of.get(name), other.of.get(name)) for name in _SAME]
    for name, a, b in [*pairs, ("width", one.features.shape[1], other.features.shape[1])]:
        if a != b:
            raise StatedError(f"{first} and {second} do not compare: {name} {a} and {b}; make both alike", field=name)


@partial(jax.jit, static_argnames=("model", "augment", "pooling", "block"))
def image_features(
    params: Params,
    images: Array,
    model: ModelConfig,
    augment: AugmentConfig,
    pooling: Pooling,
    block: int | None = None,
) -> Float[Array, "batch width"]:
    """Compute the class token, or the mean of the patches, after the encoder's last LayerNorm.

    block: take them after this block (from 0, or back from -1) instead, not normalised.

    A classifier of the patches' mean has its LayerNorm behind the mean (`fc_norm`), and so have its features.
    """
    # `blocks` ends before the last LayerNorm; a classifier that pools by the mean has none in its encoder.
    patches, mask = all_visible(normalise_images(images, augment, wide(model.dtype)), model)
    normalised = block is None and "norm" in params["encoder"]
    count = model.encoder.depth if block is None else block % model.encoder.depth + 1
    encoder, variables = Encoder(model), {"params": params["encoder"]}
    tokens = cast(
        Tokens,
        encoder.apply(variables, patches, mask)
        if normalised
        else encoder.apply(variables, patches, mask, count=count, method="blocks"),
    )
    pooled = tokens[:, :1] if pooling == "class" else tokens[:, int(model.class_token) :].mean(axis=1, keepdims=True)
    if block is None and not normalised:
        pooled = cast(Tokens, LayerNorm(model.dtype).apply({"params": params["fc_norm"]}, pooled))
    return pooled[:, 0]


def check_features(params: Params, model: ModelConfig, pooling: Pooling, block: int | None) -> None:
    """Refuse features that an encoder does not have.

    Raises:
      StatedError: there is no class token, no LayerNorm for it, or no such block.
    """
    depth = model.encoder.depth
    if pooling == "class" and not model.class_token:
        raise StatedError("pooling class needs a class token, and this model has none; use mean", field="pooling")
    if block is not None and not -depth <= block < depth:
        raise StatedError(
            f"block {block} is not in {-depth} .. {depth - 1}: the encoder has {depth} blocks", field="block"
        )
    if pooling == "class" and block is None and "norm" not in params["encoder"]:
        raise StatedError("pooling class has no LayerNorm in this classifier; use mean, or block -1", field="pooling")


class Features(NamedTuple):
    """Features of the images of a source that decode, in its order."""

    values: Float[np.ndarray, "images width"]
    labels: Int[np.ndarray, " images"]  # -1 where there is no class
    broken: Int[np.ndarray, " broken"]  # indices of those that do not decode


def source_features(
    params: Params,
    source: Source,
    model: ModelConfig,
    augment: AugmentConfig,
    pooling: Pooling,
    batch_size: int = 256,
    *,
    block: int | None = None,
    workers: int | None = None,
    report: Callable[[int], object] = lambda images: None,
) -> Features:
    """Compute features (float32) of all images of a source, on all devices of this host.

    workers: processes that read the images; by default threads do.
    report: called with the number of images of each batch, as it is done.

    Raises:
      StatedError: the encoder has no such features, or no image decodes.
    """
    check_features(params, model, pooling, block)
    devices = jax.local_devices()
    mesh = Mesh(np.array(devices), ("images",))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["images"], []))
    # Parameters on every device, images cut over them.
    params = jax.device_put(params, whole)
    # A multiple of the devices; the last batch is filled up, so that one program is compiled.
    batch_size = -(-min(batch_size, len(source)) // len(devices)) * len(devices)
    values = np.empty((len(source), model.encoder.width), np.float32)
    labels, broken, done = [np.empty(0, np.int32)], [np.empty(0, np.int64)], 0
    share = augment.evaluation_crop
    read = evaluation_batches(source, model.image_hw, model.in_channels, batch_size, share=share, workers=workers)
    with read as batches:
        for batch in batches:
            images = batch["image"]
            filled = np.concatenate([images, np.zeros((batch_size - len(images), *images.shape[1:]), np.uint8)])
            found = image_features(params, jax.device_put(filled, rows), model, augment, pooling, block)
            values[done : done + len(images)] = np.asarray(found)[: len(images)]
            done += len(images)
            labels.append(batch["label"])
            broken.append(batch["broken"])
            report(len(images) + len(batch["broken"]))
    if not done:
        raise StatedError(f"no image decodes, {source.name(0)} the first of them", field="data")
    return Features(values[:done], np.concatenate(labels), np.concatenate(broken))
