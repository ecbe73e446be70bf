"""Frozen position tables, computed in float64 (Vaswani et al. 2017, section 3.5; He et al. 2021, appendix A.1)."""

import numpy as np
from jaxtyping import Float

from mae_jax.cubic import keys_cubic

Table = Float[np.ndarray, "tokens width"]


def _angles(coordinates: np.ndarray, count: int) -> np.ndarray:
    """Coordinates times `count` frequencies 10000^-(k / count): (n,) to (n, count)."""
    return np.outer(coordinates, 10000.0 ** -(np.arange(count) / count))


def sincos2d(width: int, grid: tuple[int, int]) -> Table:
    """One row a patch, row by row: half the width for the column, half for the row; each half is [sin, cos].

    Raises:
      ValueError: width is not divisible by 4.
    """
    if width % 4:
        raise ValueError(f"width {width} is not divisible by 4, which positions sincos2d needs")
    row, column = np.divmod(np.arange(grid[0] * grid[1], dtype=np.float64), grid[1])
    halves = [_angles(coordinate, width // 4) for coordinate in (column, row)]
    return np.concatenate([f(angles) for angles in halves for f in (np.sin, np.cos)], axis=1)


def sincos1d(width: int, length: int) -> Table:
    """Position = patch index; sin on even channels, cos on odd ones.

    Raises:
      ValueError: width is odd.
    """
    if width % 2:
        raise ValueError(f"width {width} is not divisible by 2, which positions sincos1d needs")
    angles = _angles(np.arange(length, dtype=np.float64), width // 2)
    return np.stack([np.sin(angles), np.cos(angles)], axis=2).reshape(length, width)


def fixed_positions(kind: str, width: int, grid: tuple[int, int], class_token: bool) -> Table:
    """The table that a model adds to its tokens; the class token's row, in front, is zero.

    Rounded to float32, as the authors store it: a float64 model adds the same values.

    Raises:
      ValueError: `kind` is not a frozen kind, or does not allow this width.
    """
    if kind == "sincos2d":
        table = sincos2d(width, grid)
    elif kind == "sincos1d":
        table = sincos1d(width, grid[0] * grid[1])
    else:
        raise ValueError(f"positions {kind!r} are not frozen (those that are: sincos2d, sincos1d)")
    return np.concatenate([np.zeros((int(class_token), width)), table]).astype(np.float32)


def resize_positions(
    table: Table, old: tuple[int, int], new: tuple[int, int], class_token: bool
) -> Float[np.ndarray, "resized width"]:
    """A learned table for another grid of patches: bicubic, the class token's row as it is.

    The kernel is PyTorch's (Keys 1981 with a = -0.75, edges repeated, no antialiasing), as the authors resize for
    fine-tuning at another resolution. `old` and `new` are rows and columns of patches.
    """
    first, patches = table[: int(class_token)], table[int(class_token) :]
    grid = patches.reshape(*old, -1)
    rows, columns = (_bicubic(n, m) for n, m in zip(old, new, strict=True))
    resized = np.einsum("ir,jc,rcd->ijd", rows, columns, grid).reshape(new[0] * new[1], -1)
    return np.concatenate([first, resized.astype(table.dtype)])


def _bicubic(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """The weights of `old` samples in each of `new` ones."""
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        place = np.floor(centre).astype(int) + tap
        np.add.at(weights, (np.arange(new), place.clip(0, old - 1)), keys_cubic(np.abs(centre - place), -0.75))
    return weights
