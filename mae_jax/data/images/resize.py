"""A box of a picture to pixels of a size: exact, which is Pillow's bicubic to the bit, or fast, by OpenCV.

Pillow's bicubic widens its kernel where it shrinks (antialiasing). A random crop is cut first and resized then, as
torchvision does it, and no pixel outside of the box counts; a centre crop is cut out of the resized whole, and those
around it do.

Exact resizing takes half of Pillow's time. It is separable: a matrix of weights, few of them not zero, times the rows,
and another times the columns. Pillow multiplies bytes by weights of 22 bits and rounds to bytes between the two passes
(its `Resample.c`); so does this, in the order that Pillow 13 takes them, by SciPy's sparse product, which the compiler
turns into vector instructions.
"""

import math
from functools import lru_cache

import cv2
import numpy as np
from PIL import Image
from scipy import sparse

from mae_jax.cubic import keys_cubic
from mae_jax.data.images.box import Box, center_box, scale_box
from mae_jax.data.images.decode import Picture, to_array, to_image

_BITS = 22

# Beyond so many pixels the rows as 32-bit numbers leave the cache, and Pillow is as fast.
_MOST_PIXELS = 2**20

# Fast: a file is decoded to no less than this many pixels for each one of the crop, in each direction.
_FAST_MARGIN = 2.0

# Fast: areas are averaged where the crop shrinks by more than this, in each direction by itself; elsewhere it is cubic.
_AREA_FROM = 1.2


def resize_part(picture: Picture, box: Box, image_hw: tuple[int, int], fast: bool = False) -> np.ndarray:
    """Resize the part `box` of a picture to uint8 (*image_hw, channels), as if there were nothing around it.

    Whole numbers in `box` give Pillow's `crop(box).resize(...)`. `fast` is cheaper and less exact.

    Raises:
      BrokenImage: it does not decode.
    """
    size_hw = picture.size_hw
    pixels = picture.pixels(_enough(size_hw, box, image_hw) if fast else None)
    if box == (0, 0, size_hw[1], size_hw[0]) and pixels.shape[:2] == image_hw:
        return pixels
    if pixels.shape[:2] != size_hw:
        box = scale_box(box, size_hw, pixels.shape[:2])
    return _resize_fast(pixels, box, image_hw) if fast else _resize_exact(pixels, box, image_hw)


def resize_box(image: Image.Image, box: Box, image_hw: tuple[int, int]) -> Image.Image:
    """Scale an image as a whole and cut out the part `box`, of which alone the pixels are computed.

    Equal to within rounding where Pillow takes its two passes in the same order for both, which from version 13 on
    depends on the shapes: bytes are rounded and clipped in between.
    """
    return image.resize(image_hw[::-1], Image.Resampling.BICUBIC, box=box)


def center_crop(image: Image.Image, image_hw: tuple[int, int], share: float = 1.0) -> Image.Image:
    """Scale an image until it just covers (height, width) / share, and cut out the middle.

    torchvision's `Resize` and `CenterCrop`, but only the middle is computed, so that a very long picture costs no
    more than another. A share of 0.875 is the customary 224 out of 256.
    """
    return resize_box(image, center_box((image.height, image.width), image_hw, share), image_hw)


def _enough(size_hw: tuple[int, int], box: Box, image_hw: tuple[int, int]) -> tuple[int, int] | None:
    """Return the size to which the whole may be decoded for a fast resize of `box`; None: not to less than it has."""
    shrink = min((box[2] - box[0]) / image_hw[1], (box[3] - box[1]) / image_hw[0])
    scale = _FAST_MARGIN / shrink
    return None if scale >= 1 else (math.ceil(size_hw[0] * scale), math.ceil(size_hw[1] * scale))


def _resize_fast(pixels: np.ndarray, box: Box, image_hw: tuple[int, int]) -> np.ndarray:
    left, upper, right, lower = _whole_pixels(box)
    part = pixels[upper:lower, left:right]
    # Shrinking first: OpenCV's cubic kernel skips pixels, its mean over areas cannot enlarge.
    between = tuple(
        out if size > _AREA_FROM * out else size for size, out in zip(part.shape[:2], image_hw, strict=True)
    )
    if between != part.shape[:2]:
        part = cv2.resize(part, between[::-1], interpolation=cv2.INTER_AREA)
    if between != image_hw:
        part = cv2.resize(part, image_hw[::-1], interpolation=cv2.INTER_CUBIC)
    return part.reshape(*image_hw, pixels.shape[2])


def _resize_exact(pixels: np.ndarray, box: Box, image_hw: tuple[int, int]) -> np.ndarray:
    left, upper, right, lower = outer = _whole_pixels(box)
    part = pixels[upper:lower, left:right]
    if outer == box and (right - left) * (lower - upper) <= _MOST_PIXELS:
        return resize_bicubic(part, image_hw)
    # Between pixels only where the picture was scaled before: Pillow's `box` and a crop give the same for whole ones.
    inner = (
        max(0, box[0] - left),
        max(0, box[1] - upper),
        min(right - left, box[2] - left),
        min(lower - upper, box[3] - upper),
    )
    return to_array(resize_box(to_image(part), inner, image_hw))


def _whole_pixels(box: Box) -> tuple[int, int, int, int]:
    """Return the whole pixels that `box` touches; what sticks out by rounding alone is left alone."""
    slack = 1e-6
    left, upper = math.floor(box[0] + slack), math.floor(box[1] + slack)
    return left, upper, max(left + 1, math.ceil(box[2] - slack)), max(upper + 1, math.ceil(box[3] - slack))


def resize_bicubic(pixels: np.ndarray, image_hw: tuple[int, int]) -> np.ndarray:
    """Resize uint8 (height, width, channels) to uint8 (*image_hw, channels), equal to Pillow's to the bit."""
    (height, width), (out_h, out_w) = pixels.shape[:2], image_hw
    if height > out_h and height - out_h > 2 * (width - out_w):  # Pillow's rule: less is left for the other pass
        return _across(_down(np.ascontiguousarray(pixels), out_h), out_w)
    return _down(_across(pixels, out_w), out_h)


def _down(pixels: np.ndarray, out: int) -> np.ndarray:
    """Resample to `out` rows."""
    height, width, channels = pixels.shape
    if height == out:
        return pixels
    sums = bicubic_weights(height, out) @ pixels.reshape(height, width * channels).astype(np.int32)
    sums += 1 << (_BITS - 1)
    sums >>= _BITS
    return np.clip(sums, 0, 255, out=sums).astype(np.uint8).reshape(out, width, channels)


def _across(pixels: np.ndarray, out: int) -> np.ndarray:
    """Resample to `out` columns."""
    height, width, channels = pixels.shape
    turned = cv2.transpose(pixels).reshape(width, height, channels)
    return cv2.transpose(_down(turned, out)).reshape(height, out, channels)


@lru_cache(maxsize=512)  # a crop's sides are a few hundred numbers, and the weights cost as much as the product
def bicubic_weights(size: int, out: int) -> sparse.csr_array:
    """Return the weights of `size` pixels for each of `out`, in units of 2^-22: int32 (out, size)."""
    scale = size / out
    widened = max(scale, 1.0)
    centres = (np.arange(out) + 0.5) * scale
    first = np.maximum((centres - 2 * widened + 0.5).astype(np.int32), 0)
    stop = np.minimum((centres + 2 * widened + 0.5).astype(np.int32), size)
    taps = int((stop - first).max())
    pixels = first[:, None] + np.arange(taps, dtype=np.int32)
    weights = keys_cubic(np.abs((pixels - centres[:, None] + 0.5) * (1 / widened)), -0.5)
    weights[pixels >= stop[:, None]] = 0
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # summed one after the other, as in C
    units = np.trunc(weights * 2**_BITS + np.copysign(0.5, weights)).astype(np.int32)
    starts = np.arange(0, out * taps + 1, taps, dtype=np.int32)
    return sparse.csr_array((units.ravel(), np.minimum(pixels, size - 1).ravel(), starts), shape=(out, size))
