"""k-nearest-neighbour classification of frozen features, by cosine similarity (Wu et al. 2018, section 3.4)."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mae_jax.config import Pooling
from mae_jax.data.sources.source import Source, open_source
from mae_jax.errors import NoSuchSplitError, StatedError
from mae_jax.evaluation.encoders import load_pretrained, untrained
from mae_jax.evaluation.features import Features, check_alike, load_features, source_features
from mae_jax.models import Params


class Sizes(NamedTuple):
    """What is held at a time; the result is the same for all."""

    group: int = 65_536  # queries, with the nearest of each so far, while the bank passes by
    chunk: int = 16_384  # images of the bank
    block: int = 1024  # queries that are compared with a chunk at once


SIZES = Sizes()


class Neighbours(NamedTuple):
    """Of each query, the nearest first; of equally near ones the first in the bank."""

    similarity: Float[Array | np.ndarray, "*queries k"]
    row: Int[Array | np.ndarray, "*queries k"]  # in the bank


@jax.jit
def _look_through(
    found: Neighbours,
    queries: Float[Array, "blocks block width"],
    own: Int[Array, "blocks block"],
    chunk: Float[Array, "chunk width"],
    first: Int[Array | np.ndarray, ""],
    count: Int[Array | np.ndarray, ""],
) -> Neighbours:
    """What is nearest after a chunk: rows `first` and on of a bank of `count` rows; row `own` is the query itself."""

    def block(given: tuple[Neighbours, Array, Array]) -> Neighbours:
        before, asked, own = given
        similarity = jnp.matmul(asked, chunk.T, precision=jax.lax.Precision.HIGHEST)
        # top_k puts -0 behind 0, which are equal.
        similarity = jnp.where(similarity == 0, 0, similarity)
        row = first + jnp.arange(len(chunk))
        similarity = jnp.where((row >= count) | (row == own[:, None]), -jnp.inf, similarity)
        # Of equal values top_k takes the first: all that were found before come before the chunk.
        k = before.similarity.shape[-1]
        here, at = jax.lax.top_k(similarity, min(k, len(chunk)))
        values = jnp.concatenate([before.similarity, here], axis=1)
        rows = jnp.concatenate([before.row, first + at], axis=1)
        best, at = jax.lax.top_k(values, k)
        return Neighbours(best, jnp.take_along_axis(rows, at, axis=1))

    return jax.lax.map(block, (found, queries, own))


def nearest(
    bank: Float[np.ndarray, "images width"],
    queries: Float[np.ndarray, "queries width"] | None,
    k: int,
    sizes: Sizes = SIZES,
) -> Iterator[Neighbours]:
    """The k nearest images of the bank to each query, a group of queries after another.

    Without queries, each image of the bank is asked of the others. Similarities are float32 products of the highest
    precision. The device holds a group, two chunks and a block of similarities: whatever the bank's size, 0.6 GB at
    768 wide and k 200, and what it takes to sort a block (1,024 x 16,384 values).

    Raises:
      StatedError: k is not in 1 .. the number of neighbours there are, or a feature is not finite.
    """
    others = len(bank) - (queries is None)
    if not 1 <= k <= others:
        raise StatedError(f"k {k} is not in 1 .. {others}, the number of images to choose neighbours from")
    asked = bank if queries is None else queries
    for first in range(0, len(asked), sizes.group):
        rows = np.arange(first, min(first + sizes.group, len(asked)), dtype=np.int32)
        own = rows if queries is None else np.full_like(rows, -1)
        yield _nearest_of_group(bank, _unit(asked, first, len(rows)), own, k, sizes)


def _nearest_of_group(
    bank: Float[np.ndarray, "images width"],
    asked: Float[np.ndarray, "group width"],
    own: Int[np.ndarray, " group"],
    k: int,
    sizes: Sizes,
) -> Neighbours:
    size, width = asked.shape
    block, chunk = min(sizes.block, size), min(sizes.chunk, len(bank))
    blocks = -(-size // block)
    queries = jnp.asarray(_filled(asked, blocks * block).reshape(blocks, block, width))
    selves = jnp.asarray(_filled(own, blocks * block).reshape(blocks, block))
    found = Neighbours(jnp.full((blocks, block, k), -jnp.inf, jnp.float32), jnp.zeros((blocks, block, k), jnp.int32))
    for first in range(0, len(bank), chunk):
        part = _filled(_unit(bank, first, chunk), chunk)
        jax.block_until_ready(found)  # or all chunks would be on their way to the device at once
        found = _look_through(found, queries, selves, part, np.int32(first), np.int32(len(bank)))
    similarity, row = (np.asarray(values).reshape(-1, k)[:size] for values in found)
    return Neighbours(similarity, row)


def _unit(features: Float[np.ndarray, "images width"], first: int, count: int) -> Float[np.ndarray, "rows width"]:
    """Some rows at length 1; a row of zeros stays, and is equally far from all.

    Raises:
      StatedError: a value is not finite.
    """
    rows = features[first : first + count]
    lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    if not np.isfinite(lengths).all():
        raise StatedError(f"the features of image {first + int(np.argmin(np.isfinite(lengths)))} are not finite")
    return (rows / np.where(lengths == 0, 1, lengths)[:, None]).astype(np.float32)


def _filled(rows: np.ndarray, count: int) -> np.ndarray:
    """Zeros below, up to `count` rows."""
    return np.concatenate([rows, np.zeros((count - len(rows), *rows.shape[1:]), rows.dtype)])


Bank = tuple[Float[np.ndarray, "images width"], Int[np.ndarray, " images"]]
Queries = tuple[Float[np.ndarray, "queries width"], Int[np.ndarray, " queries"]]

_VOTERS = 4096  # queries whose votes are counted at a time: of 1,000 classes, 32 MB


def vote(
    found: Neighbours, labels: Int[np.ndarray, " images"], classes: int, temperature: float | None
) -> Int[np.ndarray, " queries"]:
    """The class that most neighbours vote for, in float64; of equal ones the first.

    A neighbour's vote weighs exp(similarity / temperature), or 1 where that is None.
    """
    similarity = np.asarray(found.similarity, np.float64)
    # Less the nearest's, which changes no ratio: the weights of one query cannot all be 0.
    weights = (
        np.ones_like(similarity) if temperature is None else np.exp((similarity - similarity[:, :1]) / temperature)
    )
    ballots = np.arange(len(weights))[:, None] * classes + labels[found.row]
    votes = np.bincount(ballots.ravel(), weights.ravel(), minlength=len(weights) * classes)
    return votes.reshape(-1, classes).argmax(axis=1)


def knn_predictions(
    bank: Bank,
    queries: Float[np.ndarray, "queries width"] | None,
    *,
    k: int,
    temperature: float | None,
    sizes: Sizes = SIZES,
) -> Int[np.ndarray, " queries"]:
    """The class that its k nearest neighbours in the bank give each query.

    Without queries, each image of the bank is asked of the others. `temperature` weighs a neighbour by
    exp(similarity / temperature); None counts each one once. The Lightly benchmark takes k 200 and 0.07.

    Raises:
      StatedError: k is not in 1 .. the number of neighbours there are, or the temperature is not positive.
    """
    if temperature is not None and not 0 < temperature < float("inf"):
        raise StatedError(f"temperature {temperature} is not positive and finite; None counts each neighbour once")
    features, labels = bank
    classes = int(labels.max(initial=0)) + 1
    named = [
        vote(Neighbours(*(values[first : first + _VOTERS] for values in found)), labels, classes, temperature)
        for found in nearest(features, queries, k, sizes)
        for first in range(0, len(found.row), _VOTERS)
    ]
    return np.concatenate(named)


def knn_accuracy(
    bank: Bank,
    queries: Queries | None,
    *,
    k: int,
    temperature: float | None,
    sizes: Sizes = SIZES,
) -> float:
    """The share of queries that `knn_predictions` names rightly.

    Raises:
      StatedError: as there.
    """
    asked, truth = (None, bank[1]) if queries is None else queries
    return float((knn_predictions(bank, asked, k=k, temperature=temperature, sizes=sizes) == truth).mean())


def _validation(data: str, in_channels: int) -> Source | None:
    try:
        return open_source(data, in_channels, "val")
    except NoSuchSplitError:
        return None  # images of train are asked of each other


def _with_class(values: np.ndarray, labels: np.ndarray, own: tuple[str, ...], bank: tuple[str, ...], said: str) -> Bank:
    """The images that have a class, numbered by the classes of the bank; `said` names the two.

    Raises:
      StatedError: a class is not among the bank's, or no image has one.
    """
    unknown = [name for name in own if name not in bank]
    if unknown:
        raise StatedError(f"{said}: {', '.join(unknown[:5])}")
    number = {name: place for place, name in enumerate(bank)}
    has = labels >= 0
    if not has.any():
        raise StatedError("none of the images that decode has a class")
    return values[has], np.array([number[name] for name in own], np.int32)[labels[has]]


def _asked(counts: list[int], where: str) -> str:
    bank, *queries = (f"{count:,}" for count in counts)
    return f"{queries[0]} images of {where} among {bank}" if queries else f"each of {bank} images by the others"


def compare_with_untrained(
    source: str | Path,
    data: str | None,
    *,
    k: int,
    temperature: float | None,
    pooling: Pooling,
    encoder_heads: int | None = None,
) -> str:
    """k-NN accuracy of an encoder and of the same one untrained, as a sentence.

    Raises:
      StatedError: there is no such encoder, its data has no two classes, or the model no class token to pool by.
    """
    pretrained = load_pretrained(str(source), encoder_heads)
    model, data = pretrained.model, data or pretrained.data
    if data is None:
        raise StatedError(f"{source} does not say what data it was trained on: give --data")
    train = open_source(data, model.in_channels)
    val = _validation(data, model.in_channels)
    if len(train.class_names) < 2:
        raise StatedError(f"data {data} has no classes to tell apart; give --data a folder of class folders")
    sources = [train] if val is None else [train, val]

    def score(weights: Params) -> tuple[float, list[Features], list[Bank]]:
        found = [source_features(weights, source, model, pretrained.augment, pooling) for source in sources]
        banks = [
            _with_class(
                part.values, part.labels, source.class_names, train.class_names, "val has classes that train has not"
            )
            for part, source in zip(found, sources, strict=True)
        ]
        return knn_accuracy(banks[0], banks[1] if val else None, k=k, temperature=temperature), found, banks

    trained, found, banks = score(pretrained.params)
    fresh, _, _ = score(untrained(pretrained))
    asked = _asked([len(labels) for _, labels in banks], "val")
    scores = (
        f"{trained:.2%} at step {pretrained.step}, {fresh:.2%} before training"
        if pretrained.run
        else f"{trained:.2%}, {fresh:.2%} with random weights"
    )
    return f"{k}-NN accuracy, {asked}: {scores}{_left_out(found, sources)}"


def compare_files(bank: Path, queries: Path | None, *, k: int, temperature: float | None) -> str:
    """k-NN accuracy of features that `mae-jax features` has written, as a sentence.

    Without queries, each image of the bank is asked of the others.

    Raises:
      StatedError: a file cannot be read, the two hold different features, or there are no two classes.
    """
    files = [(path, load_features(path)) for path in (bank, queries) if path]
    for path, other in files[1:]:
        check_alike(bank, files[0][1], path, other)
    names = files[0][1].class_names
    if len(names) < 2:
        raise StatedError(f"{bank} has no classes to tell apart")
    banks = [
        _with_class(found.features, found.labels, found.class_names, names, f"{path} has classes that {bank} has not")
        for path, found in files
    ]
    accuracy = knn_accuracy(banks[0], banks[1] if queries else None, k=k, temperature=temperature)
    without = sum(int((found.labels < 0).sum()) for _, found in files)
    left = f". Left out: {without} have no class" if without else ""
    return f"{k}-NN accuracy, {_asked([len(labels) for _, labels in banks], str(queries))}: {accuracy:.2%}{left}"


def _left_out(found: list[Features], sources: list[Source]) -> str:
    """A sentence on images that were not asked: those that do not decode, and those without a class."""
    broken = [source.name(int(i)) for part, source in zip(found, sources, strict=True) for i in part.broken]
    without = sum(int((part.labels < 0).sum()) for part in found)
    said = [f"{len(broken)} do not decode ({', '.join(broken[:3])})"] if broken else []
    said += [f"{without} have no class"] if without else []
    return f". Left out: {' and '.join(said)}" if said else ""
