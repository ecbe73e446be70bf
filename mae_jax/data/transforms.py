"""Crops and flips, as torchvision does them on Pillow images, with randomness from a given NumPy generator.

Resizing is Pillow's bicubic, which widens its kernel when it shrinks (antialiasing). A random crop is cut first and
resized then, as in torchvision: equal to it bit for bit for the same box.
"""

import math

import numpy as np
from PIL import Image

from mae_jax.config import AugmentConfig

Box = tuple[int, int, int, int]  # left, upper, right, lower, in pixels, as Pillow counts


def random_resized_crop_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """A random part of an image: torchvision's `RandomResizedCrop.get_params` (Szegedy et al. 2014, section 6).

    Area uniform in `scale` (of the image's), width to height log-uniform in `ratio`. After ten boxes that do not fit,
    the largest centred one whose shape is in `ratio`.
    """
    area = height * width
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        target = area * rng.uniform(*scale)
        shape = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(target * shape)), round(math.sqrt(target / shape))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    top, left = (height - h) // 2, (width - w) // 2
    return left, top, left + w, top + h


def resized_crop(image: Image.Image, box: Box, image_hw: tuple[int, int]) -> Image.Image:
    """The part `box`, resized to (height, width). A part that has that size is left as it is."""
    return image.crop(box).resize(image_hw[::-1], Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, image_hw: tuple[int, int]) -> Image.Image:
    """The image scaled until it just covers (height, width), and the middle of that.

    torchvision's `Resize` and `CenterCrop`, but only the middle is computed, so that a very long picture costs no
    more than another.
    """
    height, width = image_hw
    scale = max(height / image.height, width / image.width)
    covering_w, covering_h = max(width, int(image.width * scale)), max(height, int(image.height * scale))
    left, top = round((covering_w - width) / 2), round((covering_h - height) / 2)
    per_column, per_row = image.width / covering_w, image.height / covering_h
    box = (left * per_column, top * per_row, (left + width) * per_column, (top + height) * per_row)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def augment(
    image: Image.Image,
    config: AugmentConfig,
    image_hw: tuple[int, int],
    crop: np.random.Generator,
    flip: np.random.Generator,
) -> np.ndarray:
    """Crop and flip: an image of any size to uint8 (height, width, channels).

    `crop` and `flip` are the example's own generators (`rng.host_generator`), so that one does not shift the other.
    """
    if config.crop == "random":
        box = random_resized_crop_box(crop, image.height, image.width, config.scale, config.ratio)
        image = resized_crop(image, box, image_hw)
    else:
        image = center_crop(image, image_hw)
    pixels = to_array(image)
    return pixels[:, ::-1] if config.flip and flip.random() < 0.5 else pixels


def to_array(image: Image.Image) -> np.ndarray:
    """A grey or RGB image to uint8 (height, width, 1 or 3)."""
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels
