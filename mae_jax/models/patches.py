"""Images to patches and back (He et al. 2021, section 3)."""

from jaxtyping import Array, Float

Images = Float[Array, "batch height width channels"]
Patches = Float[Array, "batch patches values"]


def patchify(images: Images, patch_hw: tuple[int, int]) -> Patches:
    """Cut images into patches: row by row; inside a patch row, column, channel (channel last).

    Raises:
      ValueError: the image is not a whole number of patches.
    """
    batch, height, width, channels = images.shape
    rows, columns = height // patch_hw[0], width // patch_hw[1]
    if (rows * patch_hw[0], columns * patch_hw[1]) != (height, width):
        raise ValueError(f"images of {height} x {width} pixels are not a whole number of patches of {patch_hw}")
    cells = images.reshape(batch, rows, patch_hw[0], columns, patch_hw[1], channels)
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)


def unpatchify(patches: Patches, grid: tuple[int, int], patch_hw: tuple[int, int]) -> Images:
    """Put patches back: the exact inverse of `patchify`, for `grid` rows and columns of patches.

    Raises:
      ValueError: the number of patches or of values in one does not fit.
    """
    batch, count, values = patches.shape
    channels, rest = divmod(values, patch_hw[0] * patch_hw[1])
    if count != grid[0] * grid[1] or rest:
        raise ValueError(f"{count} patches of {values} values do not make {grid} patches of {patch_hw} pixels")
    cells = patches.reshape(batch, grid[0], grid[1], patch_hw[0], patch_hw[1], channels)
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(batch, grid[0] * patch_hw[0], grid[1] * patch_hw[1], channels)
