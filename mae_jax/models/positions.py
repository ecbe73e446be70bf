"""Frozen position tables, computed in float64 (Vaswani et al. 2017, section 3.5; He et al. 2021, appendix A.1)."""

import numpy as np
from jaxtyping import Float

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
