"""The k nearest images of a bank by cosine similarity, exact, though the bank be larger than the device's memory."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mae_jax.errors import StatedError


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
