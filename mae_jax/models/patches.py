"""Images to patches and back, and the tables of where each patch stands (He et al. 2021, section 3).

Tables are computed in NumPy, in float64; those that a model learns are its parameters (mae.py).
"""

import numpy as np
from jaxtyping import Array, Float

from mae_jax.cubic import keys_cubic

Images = Float[Array, "batch height width channels"]
Patches = Float[Array, "batch patches values"]
Table = Float[np.ndarray, "tokens width"]


def patchify(images: Images, patch_hw: tuple[int, int]) -> Patches:
    """Cut images into patches, row by row; the values of one go by row, column, channel (channel last).

    Raises:
      ValueError: the image is not a whole number of patches.
    """
    batch, height, width, channels = images.shape
    rows, columns = height // patch_hw[0], width // patch_hw[1]
    if (rows * patch_hw[0], columns * patch_hw[1]) != (height, width):
        raise ValueError(f"images of {height} x {width} pixels are not a whole number of patches of {patch_hw}")
    # (row of patches, row in the patch, column of patches, column in the patch, channel): patches to the front.
    cells = images.reshape(batch, rows, patch_hw[0], columns, patch_hw[1], channels)
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)


def unpatchify(patches: Patches, grid: tuple[int, int], patch_hw: tuple[int, int]) -> Images:
    """Put patches back together: the exact inverse of `patchify`, for `grid` rows and columns of patches.

    Raises:
      ValueError: the number of patches or of values in one does not fit.
    """
    batch, count, values = patches.shape
    channels, rest = divmod(values, patch_hw[0] * patch_hw[1])
    if count != grid[0] * grid[1] or rest:
        raise ValueError(f"{count} patches of {values} values do not make {grid} patches of {patch_hw} pixels")
    cells = patches.reshape(batch, grid[0], grid[1], patch_hw[0], patch_hw[1], channels)
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(batch, grid[0] * patch_hw[0], grid[1] * patch_hw[1], channels)


def fixed_positions(kind: str, width: int, grid: tuple[int, int], class_token: bool) -> Table:
    """Compute the table that a model adds to its tokens; the class token's row, in front, is zero.

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


def sincos2d(width: int, grid: tuple[int, int]) -> Table:
    """Compute one row a patch: half the width for its column, half for its row (He et al. 2021, appendix A.1).

    Raises:
      ValueError: width is not divisible by 4.
    """
    if width % 4:
        raise ValueError(f"width {width} is not divisible by 4, which positions sincos2d needs")
    row, column = np.divmod(np.arange(grid[0] * grid[1], dtype=np.float64), grid[1])
    # The column comes first, as in the authors' code; each half is all sines, then all cosines.
    halves = [_angles(coordinate, width // 4) for coordinate in (column, row)]
    return np.concatenate([f(angles) for angles in halves for f in (np.sin, np.cos)], axis=1)


def sincos1d(width: int, length: int) -> Table:
    """Compute one row a patch from its index: sines on even channels, cosines on odd ones (Vaswani et al. 2017, 3.5).

    Raises:
      ValueError: width is odd.
    """
    if width % 2:
        raise ValueError(f"width {width} is not divisible by 2, which positions sincos1d needs")
    angles = _angles(np.arange(length, dtype=np.float64), width // 2)
    return np.stack([np.sin(angles), np.cos(angles)], axis=2).reshape(length, width)


def _angles(coordinates: Float[np.ndarray, " n"], count: int) -> Float[np.ndarray, "n {count}"]:
    """Multiply coordinates by `count` frequencies 10000^-(k / count)."""
    return np.outer(coordinates, 10000.0 ** -(np.arange(count) / count))


def resize_positions(
    table: Table, old: tuple[int, int], new: tuple[int, int], class_token: bool
) -> Float[np.ndarray, "resized width"]:
    """Resize a learned table to another grid of patches: bicubic, the class token's row as it is.

    The kernel is PyTorch's (Keys 1981 with a = -0.75, edges repeated, no antialiasing), as the authors resize for
    fine-tuning at another resolution. `old` and `new` are rows and columns of patches.
    """
    first, patches = table[: int(class_token)], table[int(class_token) :]
    grid = patches.reshape(*old, -1)
    rows, columns = (_bicubic(n, m) for n, m in zip(old, new, strict=True))
    # Rows and columns are resized one after the other, by a matrix of weights each.
    resized = np.einsum("ir,jc,rcd->ijd", rows, columns, grid).reshape(new[0] * new[1], -1)
    return np.concatenate([first, resized.astype(table.dtype)])


def _bicubic(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Compute the weights of `old` samples in each of `new` ones."""
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    # Four samples lie within the kernel; those beyond an edge repeat the one at it.
    for tap in range(-1, 3):
        place = np.floor(centre).astype(int) + tap
        np.add.at(weights, (np.arange(new), place.clip(0, old - 1)), keys_cubic(np.abs(centre - place), -0.75))
    return weights
