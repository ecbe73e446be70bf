"""An image file, whatever its kind, to 8-bit grey or RGB.

As Pillow's `convert` does it, which is what torchvision's loaders use: alpha is dropped (not blended with a
background), CMYK and palettes become RGB, grey becomes three equal channels, and an animation gives its first frame.
Two departures, both because `convert` gives a picture that nobody meant: 16-bit grey is scaled to 8 bits instead of
clipped to white, and EXIF orientation is honoured, so that a photograph stands upright. A file that ends early is
broken, not half grey.
"""

import io
import os

import numpy as np
from PIL import Image, ImageOps

from mae_jax.errors import StatedError

# More pixels than this are refused before they are decoded (a few kilobytes can claim gigabytes). Pillow's own
# warning stands at the same number; the largest ImageNet photograph has 20 million.
MAX_PIXELS = 89_478_485

_MODES = {1: "L", 3: "RGB"}


class BrokenImage(Exception):
    """A file that does not give an image, for whatever reason.

    Attributes:
      name: the file.
      reason: why, in a few words.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both, so that it can be pickled
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} does not decode: {self.reason}"


def mode_for(in_channels: int) -> str:
    """Pillow's mode for a number of channels: 1 is grey, 3 is RGB.

    Raises:
      StatedError: any other number.
    """
    if in_channels not in _MODES:
        raise StatedError(f"model.in_channels {in_channels} cannot be read from image files: use 1 (grey) or 3 (RGB)")
    return _MODES[in_channels]


def decode(file: str | bytes, mode: str, name: str | None = None) -> Image.Image:
    """A path, or the bytes of a file, to an image of mode `L` or `RGB`, upright, fully read.

    Raises:
      BrokenImage: it cannot be opened, read to its end or understood, or has more than MAX_PIXELS.
    """
    name = name or (file if isinstance(file, str) else "image")
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels; {MAX_PIXELS:,} are the most that is read")
            image.load()
            return _convert(_upright(image), mode)
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error and more
        raise BrokenImage(name, _reason(error)) from error


def _upright(image: Image.Image) -> Image.Image:
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
    """16-bit grey, which Pillow may hold as 32-bit integers, to 8 bits."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"pixels of mode {image.mode} have no fixed range; save them as 8 or 16 bits")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a kind that Pillow reads"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__
