"""k-nearest-neighbour classification of frozen features, by cosine similarity (Wu et al. 2018, section 3.4)."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mae_jax.config import PretrainConfig
from mae_jax.data.sources import Source, open_source
from mae_jax.errors import StatedError
from mae_jax.evaluation.features import Pooling, source_features
from mae_jax.train.checkpoint import load_params
from mae_jax.train.steps import Params, init_state

Bank = tuple[Float[np.ndarray, "images width"], Int[np.ndarray, " images"]]
Queries = tuple[Float[np.ndarray, "queries width"], Int[np.ndarray, " queries"]]


@partial(jax.jit, static_argnames=("k", "classes", "temperature"))
def _vote(
    similarity: Float[Array, "queries bank"],
    labels: Int[Array, " bank"],
    k: int,
    classes: int,
    temperature: float | None,
) -> Int[Array, " queries"]:
    nearest, where = jax.lax.top_k(similarity, k)
    weights = jnp.ones_like(nearest) if temperature is None else jnp.exp((nearest - 1) / temperature)
    votes = jax.nn.one_hot(labels[where], classes, dtype=weights.dtype) * weights[..., None]
    return votes.sum(axis=1).argmax(axis=1)


def knn_accuracy(
    bank: Bank,
    queries: Queries | None,
    *,
    k: int,
    temperature: float | None,
    chunk: int = 1024,
) -> float:
    """The share of queries that their k nearest neighbours in the bank name rightly.

    Without queries, each image of the bank is asked of the others. `temperature` weighs a neighbour by
    exp(similarity / temperature); None counts each one once.

    Raises:
      StatedError: k is not in 1 .. the number of neighbours there are.
    """
    features, labels = bank
    others = len(features) - (queries is None)
    if not 1 <= k <= others:
        raise StatedError(f"k {k} is not in 1 .. {others}, the number of images to choose neighbours from")
    asked, truth = bank if queries is None else queries
    bank_unit, asked_unit = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features, asked))
    classes = int(max(labels.max(), truth.max())) + 1
    right = 0
    for first in range(0, len(asked), chunk):
        rows = slice(first, first + chunk)
        similarity = jnp.asarray(asked_unit[rows]) @ jnp.asarray(bank_unit).T
        if queries is None:
            itself = jnp.arange(similarity.shape[0])
            similarity = similarity.at[itself, itself + first].set(-jnp.inf)
        named = _vote(similarity, jnp.asarray(labels), k, classes, temperature)
        right += int((np.asarray(named) == truth[rows]).sum())
    return right / len(asked)


def _validation(config: PretrainConfig, data: str) -> Source | None:
    try:
        return open_source(data, config.model.in_channels, "val")
    except StatedError:
        return None  # no such split: images of train are asked of each other


def compare_with_untrained(run: Path, data: str | None, *, k: int, temperature: float | None, pooling: Pooling) -> str:
    """k-NN accuracy of a run's encoder and of the same encoder with the weights it started from, as a sentence.

    Raises:
      StatedError: there is no such run, its data has no classes, or the model no class token to pool by.
    """
    config, params, step = load_params(run)
    data = data or config.data
    if pooling == "class" and not config.model.class_token:
        raise StatedError("pooling class needs a class token, and this model has none; use mean")
    train = open_source(data, config.model.in_channels)
    val = _validation(config, data)
    if not train.class_names:
        raise StatedError(f"data {data} has no classes to tell apart; give --data a folder of class folders")

    def accuracy(weights: Params) -> float:
        bank, *queries = (
            source_features(weights, source, config.model, config.augment, pooling) for source in (train, val) if source
        )
        return knn_accuracy(bank, queries[0] if queries else None, k=k, temperature=temperature)

    trained, untrained = accuracy(params), accuracy(init_state(config).params)
    asked = (
        f"{len(val):,} images of val among {len(train):,}" if val else f"each of {len(train):,} images by the others"
    )
    return f"{k}-NN accuracy, {asked}: {trained:.2%} at step {step}, {untrained:.2%} before training"
