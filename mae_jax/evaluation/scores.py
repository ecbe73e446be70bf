"""How well a classifier, or several that share an encoder, name the images of a source."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int, UInt8

from mae_jax.config import AugmentConfig, ClassifierConfig, FinetuneConfig, wide
from mae_jax.data.chosen import Chosen
from mae_jax.data.evaluation import evaluation_batches
from mae_jax.data.sources import Source
from mae_jax.errors import StatedError
from mae_jax.models.classifier import Classifier, Pooled
from mae_jax.train.classification import folded, head_logits
from mae_jax.train.hosts import Hosts
from mae_jax.train.objective import Params, normalise_images

_MOST = 256  # images a device at once


class Outcomes(NamedTuple):
    """What was made of each image, of each head; images that do not decode or have no class are left out.

    rank: classes that were given a higher score than the true one.
    """

    rank: Int[np.ndarray, "heads images"]
    named: Int[np.ndarray, "heads images"]
    loss: Float[np.ndarray, "heads images"]
    label: Int[np.ndarray, " images"]
    place: Int[np.ndarray, " images"]  # in the source
    left_out: int

    def top(self, count: int) -> Float[np.ndarray, " heads"]:
        """The share of the images whose true class is among the `count` that were given the highest scores."""
        return (self.rank < count).mean(axis=1)


@partial(jax.jit, static_argnames=("config", "augment"))
def _judge(
    params: Params,
    images: UInt8[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
    config: ClassifierConfig,
    augment: AugmentConfig,
) -> tuple[Int[Array, "heads batch"], Int[Array, "heads batch"], Float[Array, "heads batch"]]:
    """Rank, class named and loss; of equal scores the class that comes first wins."""
    params = folded(params)
    pixels = normalise_images(images, augment, wide(config.model.dtype))
    pooled = cast(Pooled, Classifier(config).apply({"params": params}, pixels, method="pool"))
    logits = head_logits(params["head"], pooled)
    logits = logits.reshape(-1, *logits.shape[-2:])
    truth = jnp.take_along_axis(logits, labels[None, :, None], axis=-1)
    before = jnp.arange(logits.shape[-1]) < labels[:, None]
    rank = ((logits > truth) | ((logits == truth) & before)).sum(axis=-1)
    rank = jnp.where(jnp.isfinite(logits).all(axis=-1), rank, logits.shape[-1])  # nothing is above nan
    loss = jax.nn.logsumexp(logits, axis=-1) - truth[..., 0]
    return rank, logits.argmax(axis=-1), loss


def _whole(values: jax.Array) -> np.ndarray:
    return np.asarray(values if values.is_fully_addressable else multihost_utils.process_allgather(values, tiled=True))


def judge(
    params: Params,
    source: Source,
    config: FinetuneConfig,
    put: Callable[[Any], Any],
    devices: int,
    hosts: Hosts,
) -> Outcomes:
    """Show every image of a source to a classifier, centre crops; on several hosts each reads its own share.

    put: lays rows of this host out over all devices, of which there are `devices`.

    Raises:
      StatedError: no image decodes and has a class.
    """
    batch = -(-min(_MOST * devices, len(source)) // devices) * devices
    own, count = batch // hosts.count, -(-len(source) // batch)
    places = [
        first * batch + hosts.index * own + row for first in range(count) for row in range(own)
    ]  # of this host's rows; those beyond the end are not counted
    shown = Chosen(source, [min(place, len(source) - 1) for place in places])
    model = config.model
    found: list[tuple[np.ndarray, ...]] = []
    read = evaluation_batches(shown, model.image_hw, model.in_channels, own, share=config.augment.evaluation_crop)
    with contextlib.closing(read) as batches:
        for number, rows in enumerate(batches):
            images = np.zeros((own, *model.image_hw, model.in_channels), np.uint8)
            labels = np.full(own, -1, np.int32)
            at = rows["index"] - number * own
            images[at], labels[at] = rows["image"], rows["label"]
            index = np.asarray(places[number * own : (number + 1) * own])
            labels[index >= len(source)] = -1
            laid = put((images, labels, index.astype(np.int32)))
            judged = _judge(params, laid[0], jnp.maximum(laid[1], 0), config.classifier, config.augment)
            found.append(tuple(map(_whole, (*judged, laid[1], laid[2]))))
    rank, named, loss = (np.concatenate([part[i] for part in found], axis=1) for i in range(3))
    label, index = (np.concatenate([part[i] for part in found]) for i in (3, 4))
    known = label >= 0
    if not known.any():
        raise StatedError(f"none of the {len(source):,} images to evaluate on decodes and has a class")
    return Outcomes(
        rank[:, known], named[:, known], loss[:, known], label[known], index[known], len(source) - int(known.sum())
    )
