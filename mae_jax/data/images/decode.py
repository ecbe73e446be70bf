"""An image file, whatever its kind, to 8-bit grey or RGB.

As Pillow's `convert` does it, which is what torchvision's loaders use: alpha is dropped (not blended with a
background), CMYK and palettes become RGB, grey becomes three equal channels, and an animation gives its first frame.
Two departures, both because `convert` gives a picture that nobody meant: 16-bit grey is scaled to 8 bits instead of
clipped to white, and EXIF orientation is honoured, so that a photograph stands upright. A file that ends early is
broken, not half grey.

Plain JPEG files (grey or YCbCr, upright) are decoded by libjpeg-turbo to the same pixels in less time, and to fewer
pixels where fewer are asked for. Every file that it so much as warns of is decoded by Pillow, so that there is one
account of what is broken.
"""

import io
import os
import warnings
from typing import Protocol

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from mae_jax.errors import StatedError

# More pixels than this are refused before they are decoded (a few kilobytes can claim gigabytes). Pillow's own
# warning stands at the same number; the largest ImageNet photograph has 20 million.
MAX_PIXELS = 89_478_485

_MODES = {1: "L", 3: "RGB"}
_ORIENTATION = 0x0112


class BrokenImage(Exception):
    """A file that does not give an image, for whatever reason.

    Attributes:
      name: the file.
      reason: why, in a few words.
      advice: what to do about such a file, as a sentence.
    """

    def __init__(self, name: str, reason: str, advice: str = "Remove it or write it again.") -> None:
        super().__init__(name, reason, advice)  # all, so that it can be pickled
        self.name, self.reason, self.advice = name, reason, advice

    def __str__(self) -> str:
        return f"{self.name} does not decode: {self.reason}"


class TooManyPixelsError(ValueError):
    """An image larger than MAX_PIXELS."""


# Ours, and Pillow's own: it warns at the same number, which is an error where warnings are, and refuses twice of it.
_TOO_MANY_PIXELS = TooManyPixelsError, Image.DecompressionBombError, Image.DecompressionBombWarning


class Picture(Protocol):
    """An image of a known size that may not be decoded yet.

    Raises:
      BrokenImage: by its methods; it does not decode.
    """

    @property
    def size_hw(self) -> tuple[int, int]:
        """Return height and width of the whole."""

    def image(self) -> Image.Image:
        """Return the whole in its own size."""

    def pixels(self, least_hw: tuple[int, int] | None = None) -> np.ndarray:
        """Return the whole as uint8 (height, width, 1 or 3), of any size that is no less than `least_hw`.

        Without `least_hw` nothing is lost: they are all the pixels that there are.
        """


class Decoded:
    """A picture that is decoded already."""

    def __init__(self, image: Image.Image) -> None:
        self._image = image
        self._pixels: np.ndarray | None = None

    @property
    def size_hw(self) -> tuple[int, int]:
        return self._image.height, self._image.width

    def image(self) -> Image.Image:
        return self._image

    def pixels(self, least_hw: tuple[int, int] | None = None) -> np.ndarray:
        if self._pixels is None:
            self._pixels = to_array(self._image)
        return self._pixels


class JpegPicture:
    """The bytes of a plain JPEG file."""

    def __init__(self, data: bytes, size_hw: tuple[int, int], mode: str, name: str) -> None:
        self._data, self._mode, self._name = data, mode, name
        self.size_hw = size_hw
        self._pixels: np.ndarray | None = None  # the last that was decoded, for another crop of the same picture

    def image(self) -> Image.Image:
        return to_image(self.pixels())

    def pixels(self, least_hw: tuple[int, int] | None = None) -> np.ndarray:
        """Decode the file, where less will do at a fraction of its size (eighths): a cheaper inverse DCT."""
        wanted = least_hw or self.size_hw
        if self._pixels is None or self._pixels.shape[0] < wanted[0] or self._pixels.shape[1] < wanted[1]:
            pixels = _decode_plain_jpeg(self._data, self._mode, least_hw or (0, 0))
            self._pixels = to_array(decode(self._data, self._mode, self._name)) if pixels is None else pixels
        return self._pixels


class Squeezed:
    """A picture kept as a square of pixels, whatever its shape was."""

    def __init__(self, pixels: np.ndarray, size_hw: tuple[int, int]) -> None:
        self._pixels, self.size_hw = pixels, size_hw

    def image(self) -> Image.Image:
        return to_image(self._pixels).resize(self.size_hw[::-1], Image.Resampling.BICUBIC)

    def pixels(self, least_hw: tuple[int, int] | None = None) -> np.ndarray:
        return self._pixels


def prepare_decoder() -> None:
    """Make the settings of Pillow and OpenCV that suit reading many files, for this whole process.

    For worker processes and the command line, never for a program that calls the library. Pillow keeps up to 8 blocks
    of freed image memory (of 16 MB at most) instead of none: page faults on fresh memory cost up to half of a PNG's
    decoding. Its warnings about odd files, such as damaged EXIF, are off: a file that decodes is no news. OpenCV starts
    no threads, which would take turns with those that read.
    """
    import cv2  # noqa: PLC0415 - resizing needs it, decoding does not

    Image.core.set_blocks_max(8)
    cv2.setNumThreads(0)
    warnings.filterwarnings("ignore", module=r"PIL\.")


def mode_for(in_channels: int) -> str:
    """Return Pillow's mode for a number of channels: 1 is grey, 3 is RGB.

    Raises:
      StatedError: any other number.
    """
    if in_channels not in _MODES:
        raise StatedError(
            f"model.in_channels {in_channels} cannot be read from image files: use 1 (grey) or 3 (RGB)",
            field="model.in_channels",
        )
    return _MODES[in_channels]


def open_picture(file: str | bytes, mode: str, name: str | None = None) -> Picture:
    """Open a path, or the bytes of a file, as a picture of mode `L` or `RGB`; it is decoded here only if need be.

    Raises:
      BrokenImage: it cannot be opened or understood, or has more than MAX_PIXELS.
    """
    name = name or (file if isinstance(file, str) else "image")
    data = read_file(file) if isinstance(file, str) else file
    size_hw = plain_jpeg_size(data, mode)
    if size_hw is None or size_hw[0] * size_hw[1] > MAX_PIXELS:
        return Decoded(decode(data, mode, name))
    return JpegPicture(data, size_hw, mode, name)


def decode(file: str | bytes, mode: str, name: str | None = None) -> Image.Image:
    """Decode a path, or the bytes of a file, to an image of mode `L` or `RGB`, upright, fully read.

    Raises:
      BrokenImage: it cannot be opened, read to its end or understood, or has more than MAX_PIXELS.
    """
    name = name or (file if isinstance(file, str) else "image")
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise TooManyPixelsError(f"{image.width} x {image.height} pixels")
            image.load()
            return _convert(_stand_upright(image), mode)
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error and more
        raise broken(name, error) from error


def read_file(path: str) -> bytes:
    """Read the contents of an image file.

    Raises:
      BrokenImage: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise broken(path, error) from error


def broken(name: str, error: Exception) -> BrokenImage:
    """Return what is wrong with a file, and what to do, for the error that reading it ended with."""
    if isinstance(error, _TOO_MANY_PIXELS):
        size = f"{error}; " if isinstance(error, TooManyPixelsError) else ""
        reason = f"{size}{MAX_PIXELS:,} pixels are the most that is read"
        return BrokenImage(name, reason, "Cut or shrink images as large as that first.")
    if isinstance(error, Image.UnidentifiedImageError):
        return BrokenImage(name, "not an image of a kind that Pillow reads")
    if isinstance(error, OSError) and error.errno is not None:
        return BrokenImage(name, os.strerror(error.errno), "Check the disk.")
    return BrokenImage(name, str(error) or type(error).__name__)


def plain_jpeg_size(data: bytes, mode: str) -> tuple[int, int] | None:
    """Return height and width of a plain JPEG file that needs no conversion of colours for `mode`, else None."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours not in (("Gray",) if mode == "L" else ("Gray", "YCbCr")) or not _is_upright(data):
        return None
    return height, width


def to_image(pixels: np.ndarray) -> Image.Image:
    """Turn uint8 (height, width, 1 or 3) into a grey or RGB image."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def to_array(image: Image.Image) -> np.ndarray:
    """Turn a grey or RGB image into uint8 (height, width, 1 or 3)."""
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _decode_plain_jpeg(data: bytes, mode: str, least_hw: tuple[int, int]) -> np.ndarray | None:
    """Decode to uint8 (height, width, 1 or 3), `least_hw` or larger; None where libjpeg has anything against it."""
    try:
        return simplejpeg.decode_jpeg(
            data, "GRAY" if mode == "L" else "RGB", min_height=least_hw[0], min_width=least_hw[1]
        )
    except ValueError:
        return None


def _is_upright(data: bytes) -> bool:
    head = data[: 2**17]  # one metadata segment is 64 KB at most, and EXIF comes first
    if b"Exif\0\0" not in head and b"http://ns.adobe.com/xap/" not in head:
        return True
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.getexif().get(_ORIENTATION, 1) == 1
    except Exception:  # damaged metadata
        return False


def _stand_upright(image: Image.Image) -> Image.Image:
    if not image.info.keys() & {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}:
        return image  # nearly every file; looking for the tag would cost more
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata around a good picture
        return image


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    elif image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the way that Pillow asks for; the colours are the same
    return image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey, which Pillow may hold as 32-bit integers, to 8 bits."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"pixels of mode {image.mode} have no fixed range; save them as 8 or 16 bits")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))
