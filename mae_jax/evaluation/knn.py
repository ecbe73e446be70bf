"""k-nearest-neighbour classification of frozen features, by cosine similarity (Wu et al. 2018, section 3.4)."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mae_jax.config import PretrainConfig
from mae_jax.data.sources import Source, open_source
from mae_jax.errors import NoSuchSplitError, StatedError
from mae_jax.evaluation.features import Features, Pooling, source_features
from mae_jax.train.checkpoint import load_params
from mae_jax.train.objective import Params
from mae_jax.train.steps import init_state

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
    except NoSuchSplitError:
        return None  # images of train are asked of each other


def _with_class(found: Features, source: Source, numbers: dict[str, int]) -> Bank:
    """The images that have a class, numbered by the classes of train.

    Raises:
      StatedError: a class is not among them.
    """
    unknown = [name for name in source.class_names if name not in numbers]
    if unknown:
        raise StatedError(f"val has classes that train has not: {', '.join(unknown[:5])}")
    values, labels = found.values[found.labels >= 0], found.labels[found.labels >= 0]
    return values, np.array([numbers[name] for name in source.class_names], np.int32)[labels]


def compare_with_untrained(run: Path, data: str | None, *, k: int, temperature: float | None, pooling: Pooling) -> str:
    """k-NN accuracy of a run's encoder and of the same encoder with the weights it started from, as a sentence.

    Raises:
      StatedError: there is no such run, its data has no two classes, or the model no class token to pool by.
    """
    config, params, step = load_params(run)
    data = data or config.data
    if pooling == "class" and not config.model.class_token:
        raise StatedError("pooling class needs a class token, and this model has none; use mean")
    train = open_source(data, config.model.in_channels)
    val = _validation(config, data)
    if len(train.class_names) < 2:
        raise StatedError(f"data {data} has no classes to tell apart; give --data a folder of class folders")
    numbers = {name: number for number, name in enumerate(train.class_names)}
    sources = [train] if val is None else [train, val]

    def score(weights: Params) -> tuple[float, list[Features], list[Bank]]:
        found = [source_features(weights, source, config.model, config.augment, pooling) for source in sources]
        banks = [_with_class(part, source, numbers) for part, source in zip(found, sources, strict=True)]
        return knn_accuracy(banks[0], banks[1] if val else None, k=k, temperature=temperature), found, banks

    trained, found, banks = score(params)
    untrained, _, _ = score(init_state(config).params)
    counts = [f"{len(labels):,}" for _, labels in banks]
    asked = f"{counts[1]} images of val among {counts[0]}" if val else f"each of {counts[0]} images by the others"
    return f"{k}-NN accuracy, {asked}: {trained:.2%} at step {step}, {untrained:.2%} before training" + _left_out(
        found, sources
    )


def _left_out(found: list[Features], sources: list[Source]) -> str:
    """A sentence on images that were not asked: those that do not decode, and those without a class."""
    broken = [source.name(int(i)) for part, source in zip(found, sources, strict=True) for i in part.broken]
    without = sum(int((part.labels < 0).sum()) for part in found)
    said = [f"{len(broken)} do not decode ({', '.join(broken[:3])})"] if broken else []
    said += [f"{without} have no class"] if without else []
    return f". Left out: {' and '.join(said)}" if said else ""
