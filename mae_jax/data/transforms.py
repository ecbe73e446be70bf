"""Crops and flips, as torchvision does them on Pillow images, with randomness from a given NumPy generator.

Resizing is Pillow's bicubic, which widens its kernel when it shrinks (antialiasing). A random crop is cut first and
resized then, as in torchvision: equal to it bit for bit for the same box.
"""

import math

import cv2
import numpy as np
from PIL import Image

from mae_jax.config import AugmentConfig
from mae_jax.data.pictures import Box, Picture, to_array


def random_resized_crop_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
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


def center_box(size_hw: tuple[int, int], image_hw: tuple[int, int]) -> Box:
    """The middle of an image, as large as (height, width) is in it once it has been scaled to just cover that."""
    (height, width), (source_h, source_w) = image_hw, size_hw
    scale = max(height / source_h, width / source_w)
    covering_w, covering_h = max(width, int(source_w * scale)), max(height, int(source_h * scale))
    left, top = round((covering_w - width) / 2), round((covering_h - height) / 2)
    per_column, per_row = source_w / covering_w, source_h / covering_h
    return (left * per_column, top * per_row, (left + width) * per_column, (top + height) * per_row)


def center_crop(image: Image.Image, image_hw: tuple[int, int]) -> Image.Image:
    """The image scaled until it just covers (height, width), and the middle of that.

    torchvision's `Resize` and `CenterCrop`, but only the middle is computed, so that a very long picture costs no
    more than another.
    """
    box = center_box((image.height, image.width), image_hw)
    return image.resize(image_hw[::-1], Image.Resampling.BICUBIC, box=box)


def crop_box(
    size_hw: tuple[int, int], config: AugmentConfig, image_hw: tuple[int, int], crop: np.random.Generator
) -> Box:
    """The part of an image of `size_hw` that is shown."""
    if config.crop == "random":
        return random_resized_crop_box(crop, *size_hw, config.scale, config.ratio)
    return center_box(size_hw, image_hw)


def flips(config: AugmentConfig, flip: np.random.Generator) -> bool:
    """Whether an example is turned left to right."""
    return config.flip and flip.random() < 0.5


def augment(
    picture: Picture,
    config: AugmentConfig,
    image_hw: tuple[int, int],
    crop: np.random.Generator,
    flip: np.random.Generator,
) -> np.ndarray:
    """Crop and flip: a picture of any size to uint8 (height, width, channels).

    `crop` and `flip` are the example's own generators (`rng.host_generator`), so that one does not shift the other.

    Raises:
      BrokenImage: it does not decode.
    """
    box = crop_box(picture.size_hw, config, image_hw, crop)
    if config.crop == "random":
        pixels = picture.resized(box, image_hw, fast=config.resize == "fast")
    else:
        pixels = to_array(center_crop(picture.image(), image_hw))
    return cv2.flip(pixels, 1).reshape(pixels.shape) if flips(config, flip) else pixels
