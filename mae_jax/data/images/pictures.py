"""An image that is not decoded yet, so that decoding can be fused with the crop."""

import math
import os
from typing import Protocol

import cv2
import numpy as np
from PIL import Image

from mae_jax.data.images.decode import MAX_PIXELS, BrokenImage, decode
from mae_jax.data.images.jpeg import decode_jpeg, plain_jpeg_size, scaled_size
from mae_jax.data.images.resampling import MOST_PIXELS, resize_bicubic

Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels, as Pillow counts

# The fast path decodes a file to no less than this many pixels for each one of the crop, in each direction.
_FAST_MARGIN = 2.0

# It averages areas where the crop shrinks by more than this, in each direction by itself, and is cubic elsewhere.
_AREA_FROM = 1.2


class Picture(Protocol):
    """A picture of a known size. A crop of it may be had without the rest."""

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of the whole."""

    def image(self) -> Image.Image:
        """The whole, decoded.

        Raises:
          BrokenImage: it does not decode.
        """

    def resized(self, box: Box, image_hw: tuple[int, int], fast: bool = False) -> np.ndarray:
        """The part `box`, resized by antialiased bicubic: uint8 (height, width, channels).

        Whole numbers in `box` give Pillow's `crop(box).resize(...)`. `fast` is cheaper and less exact.

        Raises:
          BrokenImage: it does not decode.
        """


class Decoded:
    """A picture that is decoded already."""

    def __init__(self, image: Image.Image) -> None:
        self._image = image

    @property
    def size_hw(self) -> tuple[int, int]:
        return self._image.height, self._image.width

    def image(self) -> Image.Image:
        return self._image

    def resized(self, box: Box, image_hw: tuple[int, int], fast: bool = False) -> np.ndarray:
        return resize_part(self._image, box, image_hw, fast)


class JpegPicture:
    """The bytes of a plain JPEG file."""

    def __init__(self, data: bytes, size_hw: tuple[int, int], mode: str, name: str) -> None:
        self._data, self._mode, self._name = data, mode, name
        self.size_hw = size_hw
        self._pixels: np.ndarray | None = None  # the last that was decoded, for another crop of the same picture

    def image(self) -> Image.Image:
        return to_image(self._decoded((0, 0)))

    def resized(self, box: Box, image_hw: tuple[int, int], fast: bool = False) -> np.ndarray:
        least = (0, 0)
        if fast:
            shrink = min((box[2] - box[0]) / image_hw[1], (box[3] - box[1]) / image_hw[0])
            least = scaled_size(self.size_hw, _FAST_MARGIN / shrink)
        pixels = self._decoded(least)
        if pixels.shape[:2] != self.size_hw:
            down, across = pixels.shape[0] / self.size_hw[0], pixels.shape[1] / self.size_hw[1]
            box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
        return resize_part(pixels, box, image_hw, fast)

    def _decoded(self, least_hw: tuple[int, int]) -> np.ndarray:
        """At least `least_hw` large, or whole where that is (0, 0)."""
        wanted = self.size_hw if least_hw == (0, 0) else least_hw
        if self._pixels is None or self._pixels.shape[0] < wanted[0] or self._pixels.shape[1] < wanted[1]:
            pixels = decode_jpeg(self._data, self._mode, least_hw)
            self._pixels = to_array(decode(self._data, self._mode, self._name)) if pixels is None else pixels
        return self._pixels


class Squeezed:
    """A picture kept as a square of pixels, whatever its shape was."""

    def __init__(self, pixels: np.ndarray, size_hw: tuple[int, int]) -> None:
        self.pixels, self.size_hw = pixels, size_hw

    def image(self) -> Image.Image:
        return to_image(self.pixels).resize(self.size_hw[::-1], Image.Resampling.BICUBIC)

    def resized(self, box: Box, image_hw: tuple[int, int], fast: bool = False) -> np.ndarray:
        if box == (0, 0, self.size_hw[1], self.size_hw[0]) and image_hw == self.pixels.shape[:2]:
            return self.pixels
        down, across = self.pixels.shape[0] / self.size_hw[0], self.pixels.shape[1] / self.size_hw[1]
        box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
        return resize_part(self.pixels, box, image_hw, fast)


def open_picture(file: str | bytes, mode: str, name: str | None = None) -> Picture:
    """A path, or the bytes of a file, to a picture of mode `L` or `RGB`, upright; decoded here only if need be.

    Raises:
      BrokenImage: it cannot be opened or understood, or has more than MAX_PIXELS.
    """
    name = name or (file if isinstance(file, str) else "image")
    data = read_file(file) if isinstance(file, str) else file
    size_hw = plain_jpeg_size(data, mode)
    if size_hw is None or size_hw[0] * size_hw[1] > MAX_PIXELS:
        return Decoded(decode(data, mode, name))
    return JpegPicture(data, size_hw, mode, name)


def resize_part(whole: Image.Image | np.ndarray, box: Box, image_hw: tuple[int, int], fast: bool = False) -> np.ndarray:
    """The part `box` of an image, or of uint8 (height, width, 1 or 3), resized to uint8 (*image_hw, channels)."""
    if fast:
        return _resize_fast(to_array(whole) if isinstance(whole, Image.Image) else whole, box, image_hw)
    left, upper, right, lower = outer = _outer(box)
    if isinstance(whole, np.ndarray) and outer == box and (right - left) * (lower - upper) <= MOST_PIXELS:
        return resize_bicubic(whole[upper:lower, left:right], image_hw)
    part = whole.crop(outer) if isinstance(whole, Image.Image) else to_image(whole[upper:lower, left:right])
    # Between pixels only where the picture was scaled before: Pillow's `box` and a crop give the same for whole ones.
    inner = (
        None
        if outer == box
        else (
            max(0, box[0] - left),
            max(0, box[1] - upper),
            min(right - left, box[2] - left),
            min(lower - upper, box[3] - upper),
        )
    )
    return to_array(part.resize(image_hw[::-1], Image.Resampling.BICUBIC, box=inner))


def _resize_fast(pixels: np.ndarray, box: Box, image_hw: tuple[int, int]) -> np.ndarray:
    left, upper, right, lower = _outer(box)
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


def _outer(box: Box) -> tuple[int, int, int, int]:
    """The whole pixels that `box` touches; what sticks out by rounding alone is left alone."""
    slack = 1e-6
    left, upper = math.floor(box[0] + slack), math.floor(box[1] + slack)
    return left, upper, max(left + 1, math.ceil(box[2] - slack)), max(upper + 1, math.ceil(box[3] - slack))


def to_image(pixels: np.ndarray) -> Image.Image:
    """uint8 (height, width, 1 or 3) to a grey or RGB image."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def to_array(image: Image.Image) -> np.ndarray:
    """A grey or RGB image to uint8 (height, width, 1 or 3)."""
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def read_file(path: str) -> bytes:
    """The contents of an image file.

    Raises:
      BrokenImage: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BrokenImage(path, os.strerror(error.errno) if error.errno is not None else str(error)) from error
