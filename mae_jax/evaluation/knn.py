"""k-nearest-neighbour classification of frozen features, by cosine similarity (Wu et al. 2018, section 3.4)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mae_jax.config import Pooling
from mae_jax.data.sources.source import open_source
from mae_jax.errors import NoSuchSplitError, StatedError
from mae_jax.evaluation.encoders import load_pretrained, untrained
from mae_jax.evaluation.features import Features, check_alike, load_features, source_features
from mae_jax.models import Params


class Sizes(NamedTuple):
    """How much is held at a time; the result is the same for all."""

    group: int = 65_536  # queries, with the nearest of each so far, for one pass over the bank
    chunk: int = 16_384  # images of the bank
    block: int = 1024  # queries that are compared with a chunk at once


SIZES = Sizes()


class Neighbours(NamedTuple):
    """The neighbours of each query, the nearest first; of equally near ones the first in the bank."""

    similarity: Float[Array | np.ndarray, "*queries k"]
    row: Int[Array | np.ndarray, "*queries k"]  # in the bank


@jax.jit
def _merge_chunk(
    found: Neighbours,
    queries: Float[Array, "blocks block width"],
    own: Int[Array, "blocks block"],
    chunk: Float[Array, "chunk width"],
    first: Int[Array | np.ndarray, ""],
    count: Int[Array | np.ndarray, ""],
) -> Neighbours:
    """Merge the nearest so far with a chunk: rows `first` on of a bank of `count`; row `own` is the query itself."""

    def block(inputs: tuple[Neighbours, Array, Array]) -> Neighbours:
        before, queries, own = inputs
        # Features have length 1: the product is the cosine. top_k would put -0 behind 0, which are equal.
        similarity = jnp.matmul(queries, chunk.T, precision=jax.lax.Precision.HIGHEST)
        similarity = jnp.where(similarity == 0, 0, similarity)
        # Rows beyond the bank, which fill up its last chunk, and the query itself are never near.
        row = first + jnp.arange(len(chunk))
        similarity = jnp.where((row >= count) | (row == own[:, None]), -jnp.inf, similarity)
        # The k nearest are among the k nearest so far and the k nearest of the chunk. Of equal values top_k takes the
        # first, and earlier chunks stand in front.
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
    """Find the k nearest images of the bank to each query, a group of queries after another.

    Without queries, each image of the bank is looked up among the others. Similarities are float32 products of the
    highest precision. The device holds a group, two chunks and a block of similarities: whatever the bank's size,
    0.6 GB at 768 wide and k 200, and what it takes to sort a block (1,024 x 16,384 values).

    Raises:
      StatedError: k is not in 1 .. the number of neighbours there are, or a feature is not finite.
    """
    others = len(bank) - (queries is None)
    if not 1 <= k <= others:
        raise StatedError(f"k {k} is not in 1 .. {others}, the number of images to choose neighbours from", field="k")
    features = bank if queries is None else queries
    for first in range(0, len(features), sizes.group):
        rows = np.arange(first, min(first + sizes.group, len(features)), dtype=np.int32)
        own = rows if queries is None else np.full_like(rows, -1)
        yield _nearest_of_group(bank, _unit(features, first, len(rows)), own, k, sizes)


def _nearest_of_group(
    bank: Float[np.ndarray, "images width"],
    group: Float[np.ndarray, "group width"],
    own: Int[np.ndarray, " group"],
    k: int,
    sizes: Sizes,
) -> Neighbours:
    """Pass over the bank once, chunk by chunk, for a group of queries."""
    size, width = group.shape
    # Queries and chunks are filled up with zeros to full blocks, so that one program serves all of them.
    block, chunk = min(sizes.block, size), min(sizes.chunk, len(bank))
    blocks = -(-size // block)
    queries = jnp.asarray(_filled(group, blocks * block).reshape(blocks, block, width))
    selves = jnp.asarray(_filled(own, blocks * block).reshape(blocks, block))
    found = Neighbours(jnp.full((blocks, block, k), -jnp.inf, jnp.float32), jnp.zeros((blocks, block, k), jnp.int32))
    for first in range(0, len(bank), chunk):
        part = _filled(_unit(bank, first, chunk), chunk)
        jax.block_until_ready(found)  # else all chunks would be sent to the device at once
        found = _merge_chunk(found, queries, selves, part, np.int32(first), np.int32(len(bank)))
    similarity, row = (np.asarray(values).reshape(-1, k)[:size] for values in found)
    return Neighbours(similarity, row)


def _unit(features: Float[np.ndarray, "images width"], first: int, count: int) -> Float[np.ndarray, "rows width"]:
    """Scale some rows to length 1; a row of zeros stays, and is equally far from all.

    Raises:
      StatedError: a value is not finite.
    """
    rows = features[first : first + count]
    lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    if not np.isfinite(lengths).all():
        image = first + int(np.argmin(np.isfinite(lengths)))
        raise StatedError(f"the features of image {image} are not finite", field="features")
    return (rows / np.where(lengths == 0, 1, lengths)[:, None]).astype(np.float32)


def _filled(rows: np.ndarray, count: int) -> np.ndarray:
    """Fill up with zeros to `count` rows."""
    return np.concatenate([rows, np.zeros((count - len(rows), *rows.shape[1:]), rows.dtype)])


Bank = tuple[Float[np.ndarray, "images width"], Int[np.ndarray, " images"]]
Queries = tuple[Float[np.ndarray, "queries width"], Int[np.ndarray, " queries"]]

_VOTERS = 4096  # queries whose votes are counted at a time: of 1,000 classes, 32 MB


def vote(
    found: Neighbours, labels: Int[np.ndarray, " images"], classes: int, temperature: float | None
) -> Int[np.ndarray, " queries"]:
    """Count votes in float64, and return the class with the most; of equal ones the first.

    A neighbour's vote weighs exp(similarity / temperature), or 1 where that is None.
    """
    similarity = np.asarray(found.similarity, np.float64)
    # The nearest's similarity is subtracted, which changes no ratio: the weights of one query cannot all be 0.
    weights = (
        np.ones_like(similarity) if temperature is None else np.exp((similarity - similarity[:, :1]) / temperature)
    )
    # One count over pairs (query, class), numbered row by row.
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
    """Predict the class of each query by a vote of its k nearest neighbours in the bank.

    Without queries, each image of the bank is looked up among the others. `temperature` weighs a neighbour by
    exp(similarity / temperature); None counts each one once. The Lightly benchmark takes k 200 and 0.07.

    Raises:
      StatedError: k is not in 1 .. the number of neighbours there are, or the temperature is not positive.
    """
    if temperature is not None and not 0 < temperature < float("inf"):
        raise StatedError(
            f"temperature {temperature} is not positive and finite; None counts each neighbour once",
            field="temperature",
        )
    features, labels = bank
    classes = int(labels.max(initial=0)) + 1
    predicted = [
        vote(Neighbours(*(values[first : first + _VOTERS] for values in found)), labels, classes, temperature)
        for found in nearest(features, queries, k, sizes)
        for first in range(0, len(found.row), _VOTERS)
    ]
    return np.concatenate(predicted)


def knn_accuracy(
    bank: Bank,
    queries: Queries | None,
    *,
    k: int,
    temperature: float | None,
    sizes: Sizes = SIZES,
) -> float:
    """Compute the share of queries whose class `knn_predictions` predicts.

    Raises:
      StatedError: as `knn_predictions`.
    """
    features, truth = (None, bank[1]) if queries is None else queries
    return float((knn_predictions(bank, features, k=k, temperature=temperature, sizes=sizes) == truth).mean())


def compare_with_untrained(
    source: str | Path,
    data: str | None,
    *,
    k: int,
    temperature: float | None,
    pooling: Pooling,
    encoder_heads: int | None = None,
) -> str:
    """Score an encoder and the same one untrained by k-NN accuracy, and return a sentence.

    Raises:
      StatedError: there is no such encoder, its data has no two classes, or the model no class token to pool by.
    """
    pretrained = load_pretrained(str(source), encoder_heads)
    model, data = pretrained.model, data or pretrained.data
    if data is None:
        raise StatedError(f"data: {source} has no record of what it was trained on, give --data", field="data")
    sources = [open_source(data, model.in_channels)]
    with contextlib.suppress(NoSuchSplitError):  # without val, images of train are looked up among each other
        sources.append(open_source(data, model.in_channels, "val"))
    if len(sources[0].class_names) < 2:
        raise StatedError(f"data {data} has no two classes; give --data a folder of class folders", field="data")

    def score(weights: Params) -> tuple[float, list[Features], list[Bank]]:
        found = [source_features(weights, source, model, pretrained.augment, pooling) for source in sources]
        banks = [
            _with_class(part.values, part.labels, source.class_names, sources[0].class_names, name, "train")
            for part, source, name in zip(found, sources, ("train", "val"), strict=False)
        ]
        queries = banks[1] if len(banks) > 1 else None
        return knn_accuracy(banks[0], queries, k=k, temperature=temperature), found, banks

    trained, found, banks = score(pretrained.params)
    untrained_score, _, _ = score(untrained(pretrained))
    scores = (
        f"{trained:.2%} at step {pretrained.step}, {untrained_score:.2%} before training"
        if pretrained.run
        else f"{trained:.2%}, {untrained_score:.2%} with random weights"
    )
    broken = [source.name(int(i)) for part, source in zip(found, sources, strict=True) for i in part.broken]
    left_out = [f"{len(broken)} do not decode ({', '.join(broken[:3])})"] if broken else []
    return _sentence(k, [len(labels) for _, labels in banks], "val", scores, [part.labels for part in found], left_out)


def compare_files(bank: Path, queries: Path | None, *, k: int, temperature: float | None) -> str:
    """Score files that `mae-jax features` has written by k-NN accuracy, and return a sentence.

    Without queries, each image of the bank is looked up among the others.

    Raises:
      StatedError: a file cannot be read, the two hold different features, or there are no two classes.
    """
    files = [(path, load_features(path)) for path in (bank, queries) if path]
    for path, other in files[1:]:
        check_alike(bank, files[0][1], path, other)
    names = files[0][1].class_names
    if len(names) < 2:
        raise StatedError(f"{bank} has no two classes", field=bank.name)
    banks = [
        _with_class(found.features, found.labels, found.class_names, names, str(path), str(bank))
        for path, found in files
    ]
    accuracy = knn_accuracy(banks[0], banks[1] if queries else None, k=k, temperature=temperature)
    counts, labels = [len(labels) for _, labels in banks], [found.labels for _, found in files]
    return _sentence(k, counts, str(queries), f"{accuracy:.2%}", labels, [])


def _with_class(
    values: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], known: tuple[str, ...], name: str, bank: str
) -> Bank:
    """Keep the images that have a class, numbered by the classes of the bank.

    Raises:
      StatedError: a class is not among the bank's, or no image has one.
    """
    unknown = [one for one in classes if one not in known]
    if unknown:
        raise StatedError(f"{name} has classes that {bank} has not: {', '.join(unknown[:5])}", field="classes")
    number = {one: place for place, one in enumerate(known)}
    has = labels >= 0
    if not has.any():
        raise StatedError(f"labels of {name}: none of the images that decode has a class", field="labels")
    return values[has], np.array([number[one] for one in classes], np.int32)[labels[has]]


def _sentence(k: int, counts: list[int], name: str, scores: str, labels: list[np.ndarray], left_out: list[str]) -> str:
    """Word a result: of how many images, what was left out, and the scores."""
    bank, *queries = (f"{count:,}" for count in counts)
    images = f"{queries[0]} images of {name} among {bank}" if queries else f"each of {bank} images by the others"
    without = sum(int((part < 0).sum()) for part in labels)
    left_out = left_out + ([f"{without} have no class"] if without else [])
    return f"{k}-NN accuracy, {images}: {scores}" + (f". Left out: {' and '.join(left_out)}" if left_out else "")
