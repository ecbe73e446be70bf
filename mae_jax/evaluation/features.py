"""What an encoder says of whole images: no patch is hidden."""

import contextlib
from functools import partial
from typing import Literal, NamedTuple, cast

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from mae_jax.config import AugmentConfig, ModelConfig, wide
from mae_jax.data.evaluation import evaluation_batches
from mae_jax.data.sources import Source
from mae_jax.models.layers import Tokens
from mae_jax.models.mae import MaskedAutoencoder
from mae_jax.train.objective import Params, normalise_images

Pooling = Literal["mean", "class"]


@partial(jax.jit, static_argnames=("model", "augment", "pooling"))
def image_features(
    params: Params, images: Array, model: ModelConfig, augment: AugmentConfig, pooling: Pooling
) -> Float[Array, "batch width"]:
    """The class token, or the mean of the patches, after the encoder's last LayerNorm."""
    pixels = normalise_images(images, augment, wide(model.dtype))
    tokens = cast(Tokens, MaskedAutoencoder(model).apply({"params": params}, pixels, method="encode"))
    return tokens[:, 0] if pooling == "class" else tokens[:, int(model.class_token) :].mean(axis=1)


class Features(NamedTuple):
    """Of the images of a source that decode, in its order."""

    values: Float[np.ndarray, "images width"]
    labels: Int[np.ndarray, " images"]  # -1 where there is no class
    broken: Int[np.ndarray, " broken"]  # indices of those that do not decode


def source_features(
    params: Params, source: Source, model: ModelConfig, augment: AugmentConfig, pooling: Pooling, batch_size: int = 256
) -> Features:
    """Features and labels of all images of a source."""
    features, labels, broken = [], [], []
    crops = evaluation_batches(source, model.image_hw, model.in_channels, batch_size, share=augment.evaluation_crop)
    with contextlib.closing(crops) as batches:
        for batch in batches:
            features.append(np.asarray(image_features(params, batch["image"], model, augment, pooling)))
            labels.append(batch["label"])
            broken.append(batch["broken"])
    return Features(*map(np.concatenate, (features, labels, broken)))
