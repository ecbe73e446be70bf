"""Pillow's antialiased bicubic, equal to the bit, in about half of its time.

Resampling is separable: a matrix of weights, few of them not zero, times the rows, and another times the columns.
Pillow multiplies bytes by weights of 22 bits and rounds to bytes between the two passes (its `Resample.c`, with Keys'
kernel, a = -0.5, widened where it shrinks); so does this, in the order that Pillow 13 takes them, by SciPy's sparse
product, which the compiler turns into vector instructions.
"""

from functools import lru_cache

import cv2
import numpy as np
from scipy import sparse

_BITS = 22

# Beyond so many pixels the rows as 32-bit numbers leave the cache, and Pillow is as fast.
MOST_PIXELS = 2**20


def resize_bicubic(pixels: np.ndarray, image_hw: tuple[int, int]) -> np.ndarray:
    """uint8 (height, width, channels) to uint8 (*image_hw, channels)."""
    (height, width), (out_h, out_w) = pixels.shape[:2], image_hw
    if height > out_h and height - out_h > 2 * (width - out_w):  # Pillow's rule: less is left for the other pass
        return _across(_down(np.ascontiguousarray(pixels), out_h), out_w)
    return _down(_across(pixels, out_w), out_h)


def _down(pixels: np.ndarray, out: int) -> np.ndarray:
    """To `out` rows."""
    height, width, channels = pixels.shape
    if height == out:
        return pixels
    sums = bicubic_weights(height, out) @ pixels.reshape(height, width * channels).astype(np.int32)
    sums += 1 << (_BITS - 1)
    sums >>= _BITS
    return np.clip(sums, 0, 255, out=sums).astype(np.uint8).reshape(out, width, channels)


def _across(pixels: np.ndarray, out: int) -> np.ndarray:
    """To `out` columns."""
    height, width, channels = pixels.shape
    turned = cv2.transpose(pixels).reshape(width, height, channels)
    return cv2.transpose(_down(turned, out)).reshape(height, out, channels)


@lru_cache(maxsize=512)  # a crop's sides are a few hundred numbers, and the weights cost as much as the product
def bicubic_weights(size: int, out: int) -> sparse.csr_array:
    """Weights of `size` pixels for each of `out`, in units of 2^-22: int32 (out, size)."""
    scale = size / out
    widened = max(scale, 1.0)
    centres = (np.arange(out) + 0.5) * scale
    first = np.maximum((centres - 2 * widened + 0.5).astype(np.int32), 0)
    stop = np.minimum((centres + 2 * widened + 0.5).astype(np.int32), size)
    taps = int((stop - first).max())
    pixels = first[:, None] + np.arange(taps, dtype=np.int32)
    x = np.abs((pixels - centres[:, None] + 0.5) * (1 / widened))
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights[pixels >= stop[:, None]] = 0
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # summed one after the other, as in C
    units = np.trunc(weights * 2**_BITS + np.copysign(0.5, weights)).astype(np.int32)
    starts = np.arange(0, out * taps + 1, taps, dtype=np.int32)
    return sparse.csr_array((units.ravel(), np.minimum(pixels, size - 1).ravel(), starts), shape=(out, size))
