"""Plain JPEG files, decoded by libjpeg-turbo (simplejpeg) to the same pixels as Pillow's, in less time.

Plain: grey or YCbCr, upright. Everything else, and every file that libjpeg so much as warns of, is Pillow's to judge
(`decoding.decode`), so that there is one account of what is broken.
"""

import io
import math

import numpy as np
import simplejpeg
from PIL import Image

_ORIENTATION = 0x0112


def plain_jpeg_size(data: bytes, mode: str) -> tuple[int, int] | None:
    """Height and width of a plain JPEG file that gives Pillow's `mode` without a conversion of colours, else None."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours not in (("Gray",) if mode == "L" else ("Gray", "YCbCr")) or not _upright(data):
        return None
    return height, width


def decode_jpeg(data: bytes, mode: str, least_hw: tuple[int, int] = (0, 0)) -> np.ndarray | None:
    """A plain JPEG file to uint8 (height, width, 1 or 3), or None where libjpeg has anything to say against it.

    With `least_hw` it may come at a fraction of its size (eighths), not under `least_hw`: a cheaper inverse DCT.
    """
    try:
        return simplejpeg.decode_jpeg(
            data, "GRAY" if mode == "L" else "RGB", min_height=least_hw[0], min_width=least_hw[1]
        )
    except ValueError:
        return None


def scaled_size(size_hw: tuple[int, int], scale: float) -> tuple[int, int]:
    """The size that a file of `size_hw` may at least be decoded to, to lose no more than `scale` (over 1: nothing)."""
    if scale >= 1:
        return 0, 0
    return math.ceil(size_hw[0] * scale), math.ceil(size_hw[1] * scale)


def _upright(data: bytes) -> bool:
    head = data[: 2**17]  # one metadata segment is 64 KB at most, and EXIF comes first
    if b"Exif\0\0" not in head and b"http://ns.adobe.com/xap/" not in head:
        return True
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.getexif().get(_ORIENTATION, 1) == 1
    except Exception:  # damaged metadata
        return False
