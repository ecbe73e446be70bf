"""What an encoder says of whole images: no patch is hidden."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from mae_jax.config import AugmentConfig, ModelConfig, Pooling, wide
from mae_jax.data.evaluation import evaluation_batches
from mae_jax.data.sources import Source
from mae_jax.errors import StatedError
from mae_jax.models.layers import LayerNorm, Tokens
from mae_jax.models.mae import Encoder, everything_visible
from mae_jax.train.objective import Params, normalise_images


@partial(jax.jit, static_argnames=("model", "augment", "pooling", "block"))
def image_features(
    params: Params,
    images: Array,
    model: ModelConfig,
    augment: AugmentConfig,
    pooling: Pooling,
    block: int | None = None,
) -> Float[Array, "batch width"]:
    """The class token, or the mean of the patches, after the encoder's last LayerNorm.

    block: in place of that, as they leave this block (from 0, or back from -1), not normalised.

    A classifier of the patches' mean has its LayerNorm behind the mean (`fc_norm`), and so have its features.
    """
    patches, mask = everything_visible(normalise_images(images, augment, wide(model.dtype)), model)
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
        raise StatedError("pooling class needs a class token, and this model has none; use mean")
    if block is not None and not -depth <= block < depth:
        raise StatedError(f"block {block} is not in {-depth} .. {depth - 1}: the encoder has {depth} blocks")
    if pooling == "class" and block is None and "norm" not in params["encoder"]:
        raise StatedError(
            "pooling class: this classifier normalises the mean of the patches alone; use mean, or block -1"
        )


class Features(NamedTuple):
    """Of the images of a source that decode, in its order."""

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
    tell: Callable[[int], object] = lambda images: None,
) -> Features:
    """Features (float32) and labels of all images of a source, computed on all devices of this host.

    tell: is called with the number of images, as they are done.

    Raises:
      StatedError: the encoder has no such features, or no image decodes.
    """
    check_features(params, model, pooling, block)
    devices = jax.local_devices()
    mesh = Mesh(np.array(devices), ("images",))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["images"], []))
    params = jax.device_put(params, whole)
    # A multiple of the devices; the last batch is filled up, so that one program is compiled.
    batch_size = -(-min(batch_size, len(source)) // len(devices)) * len(devices)
    values = np.empty((len(source), model.encoder.width), np.float32)
    labels, broken, done = [np.empty(0, np.int32)], [np.empty(0, np.int64)], 0
    with contextlib.closing(
        evaluation_batches(source, model.image_hw, model.in_channels, batch_size, share=augment.evaluation_crop)
    ) as batches:
        for batch in batches:
            images = batch["image"]
            filled = np.concatenate([images, np.zeros((batch_size - len(images), *images.shape[1:]), np.uint8)])
            found = image_features(params, jax.device_put(filled, rows), model, augment, pooling, block)
            values[done : done + len(images)] = np.asarray(found)[: len(images)]
            done += len(images)
            labels.append(batch["label"])
            broken.append(batch["broken"])
            tell(len(images) + len(batch["broken"]))
    if not done:
        raise StatedError(f"no image decodes, {source.name(0)} the first of them")
    return Features(values[:done], np.concatenate(labels), np.concatenate(broken))
