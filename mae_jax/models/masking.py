"""Masks from noise: which patches stay visible (He et al. 2021, section 3, Table 1f and Figure 6).

Noise is uniform on [0, 1), one row an example. Every kind of mask turns it into scores; the patches with the
smallest scores stay. So a mask is a function of its noise, and the number of visible patches never varies.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from mae_jax.config import ModelConfig

Noise = Float[Array, "batch patches"]
Scores = Shaped[Array, "batch patches"]
Ids = Int[Array, "batch patches"]

# Blocks as large as BEiT's (Bao et al. 2021, algorithm 1): 10 to 40 % of the image, aspect 0.3 to 1 / 0.3.
BLOCK_AREA = (0.1, 0.4)
BLOCK_ASPECT = 0.3


class Mask(NamedTuple):
    """Which patches an example's encoder sees.

    ids_shuffle: patches, visible ones first. ids_restore: its inverse, each patch's place in ids_shuffle.
    hidden: 1 where a patch is hidden, 0 where it is visible, in image order.
    """

    ids_shuffle: Ids
    ids_restore: Ids
    hidden: Float[Array, "batch patches"]


def keep_smallest(scores: Scores, keep: int) -> Mask:
    """Split patches into visible and hidden: the `keep` smallest scores stay.

    Ties go to the lower index (stable sort), so float noise with repeats still gives one answer.

    Raises:
      ValueError: keep is not in 1 .. patches - 1.
    """
    if not 1 <= keep < scores.shape[1]:
        raise ValueError(f"keep {keep} is not in 1 .. {scores.shape[1] - 1}")
    # ids_shuffle[i] is the patch at place i; its inverse, ids_restore[p], the place of patch p. A patch is hidden if
    # its place is behind the visible ones.
    ids_shuffle = jnp.argsort(scores, axis=1, stable=True)
    ids_restore = jnp.argsort(ids_shuffle, axis=1)
    return Mask(ids_shuffle, ids_restore, (ids_restore >= keep).astype(jnp.float32))


def grid_scores(noise: Noise, grid: tuple[int, int], stride: int) -> Scores:
    """Score patches so that one of every stride x stride stays, the same in every cell; the first noise picks it."""
    # The smallest of the first s x s values picks one of a cell's s x s patches. Scores are 0 or 1; ties go by index.
    offset = jnp.argmin(noise[:, : stride**2], axis=1)[:, None]
    row, column = jnp.divmod(jnp.arange(grid[0] * grid[1]), grid[1])
    return ((row % stride) * stride + column % stride != offset).astype(jnp.int32)


def block_scores(noise: Noise, grid: tuple[int, int]) -> Scores:
    """Score patches so that large rectangles are hidden, one after another (as Bao et al. 2021); the last may be cut.

    Four noise values make a rectangle: area, aspect, top, left. A patch is hidden with the first rectangle
    that covers it, row by row inside one; what none covers comes last.
    """
    rows, columns = grid
    count = rows * columns // 4
    # Draw rectangles, each (batch, count, 1): area and aspect first, since the free places depend on them.
    area, aspect, top, left = jnp.moveaxis(noise[:, : 4 * count].reshape(-1, count, 4, 1), 2, 0)
    low, high = BLOCK_AREA
    area = rows * columns * (low + (high - low) * area)
    aspect = jnp.exp((1 - 2 * aspect) * math.log(BLOCK_ASPECT))
    height = jnp.clip(jnp.round(jnp.sqrt(area * aspect)), 1, rows)
    width = jnp.clip(jnp.round(jnp.sqrt(area / aspect)), 1, columns)
    top = jnp.floor(top * (rows - height + 1))
    left = jnp.floor(left * (columns - width + 1))
    # For each patch, the first rectangle that covers it, or `count`. Its rank is (that rectangle, its own index), and
    # the lowest ranks are to be hidden; since the smallest scores stay visible, the score is the rank negated.
    patch = jnp.arange(rows * columns)
    row, column = (axis.astype(noise.dtype) for axis in jnp.divmod(patch, columns))
    covered = (top <= row) & (row < top + height) & (left <= column) & (column < left + width)
    first = jnp.where(covered.any(axis=1), jnp.argmax(covered, axis=1), count)
    return -(first * patch.size + patch)


def make_mask(noise: Noise, config: ModelConfig) -> Mask:
    """Make the mask of this noise, as `config.masking` and `config.mask_ratio` have it."""
    if config.masking == "grid":
        return keep_smallest(grid_scores(noise, config.grid, config.grid_stride), config.keep)
    if config.masking == "block":
        return keep_smallest(block_scores(noise, config.grid), config.keep)
    return keep_smallest(noise, config.keep)
