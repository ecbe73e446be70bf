"""Crops, flips and what follows, as torchvision does them on Pillow images, with randomness from NumPy generators.

Resizing is Pillow's bicubic, which widens its kernel when it shrinks (antialiasing). A random crop is cut first and
resized then, as in torchvision: equal to it bit for bit for the same box.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from mae_jax.config import AugmentConfig
from mae_jax.data.images.distort import color_jitter, fill_colour, rand_augment
from mae_jax.data.images.pictures import Box, Picture, to_array, to_image


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


def covering_size(size_hw: tuple[int, int], least_hw: tuple[int, int]) -> tuple[int, int]:
    """The size that an image has once it is scaled to just cover `least_hw`: torchvision's `Resize` for a square."""
    (height, width), (source_h, source_w) = least_hw, size_hw
    if height * source_w >= width * source_h:
        return height, height * source_w // source_h
    return width * source_h // source_w, width


def _box_of_scaled(
    size_hw: tuple[int, int], scaled_hw: tuple[int, int], corner: tuple[int, int], image_hw: tuple[int, int]
) -> Box:
    """The part of an image that shows where `image_hw` is cut, from `corner` (top, left) on, once it is scaled."""
    (source_h, source_w), (scaled_h, scaled_w), (top, left), (height, width) = size_hw, scaled_hw, corner, image_hw
    return (
        left * source_w / scaled_w,
        top * source_h / scaled_h,
        (left + width) * source_w / scaled_w,
        (top + height) * source_h / scaled_h,
    )


def fixed_size_crop_box(rng: np.random.Generator, size_hw: tuple[int, int], image_hw: tuple[int, int]) -> Box:
    """A random part of fixed size (He et al. 2021, Table 1e): `image_hw` of an image scaled to just cover 8/7 of it.

    For 224 that is torchvision's `Resize(256)` and `RandomCrop(224)`.
    """
    scaled = covering_size(size_hw, (round(image_hw[0] * 8 / 7), round(image_hw[1] * 8 / 7)))
    corner = int(rng.integers(scaled[0] - image_hw[0] + 1)), int(rng.integers(scaled[1] - image_hw[1] + 1))
    return _box_of_scaled(size_hw, scaled, corner, image_hw)


def center_box(size_hw: tuple[int, int], image_hw: tuple[int, int], share: float = 1.0) -> Box:
    """The middle of an image: `image_hw` once it is scaled to just cover `image_hw` / `share`."""
    scaled = covering_size(size_hw, (int(image_hw[0] / share), int(image_hw[1] / share)))
    corner = round((scaled[0] - image_hw[0]) / 2), round((scaled[1] - image_hw[1]) / 2)
    return _box_of_scaled(size_hw, scaled, corner, image_hw)


def resize_box(image: Image.Image, box: Box, image_hw: tuple[int, int]) -> Image.Image:
    """The image scaled as a whole, and the part `box` of it cut out then: only this part is computed.

    Equal to within rounding where Pillow takes its two passes in the same order for both, which from version 13 on
    depends on the shapes: bytes are rounded and clipped in between.
    """
    return image.resize(image_hw[::-1], Image.Resampling.BICUBIC, box=box)


def center_crop(image: Image.Image, image_hw: tuple[int, int], share: float = 1.0) -> Image.Image:
    """The image scaled until it just covers (height, width) / share, and the middle of that.

    torchvision's `Resize` and `CenterCrop`, but only the middle is computed, so that a very long picture costs no
    more than another. A share of 0.875 is the customary 224 out of 256.
    """
    return resize_box(image, center_box((image.height, image.width), image_hw, share), image_hw)


def crop_box(
    size_hw: tuple[int, int], config: AugmentConfig, image_hw: tuple[int, int], crop: np.random.Generator
) -> Box:
    """The part of an image of `size_hw` that is shown."""
    if config.crop == "random":
        return random_resized_crop_box(crop, *size_hw, config.scale, config.ratio)
    if config.crop == "fixed":
        return fixed_size_crop_box(crop, size_hw, image_hw)
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
        pixels = to_array(resize_box(picture.image(), box, image_hw))
    return cv2.flip(pixels, 1).reshape(pixels.shape) if flips(config, flip) else pixels


def distort(pixels: np.ndarray, config: AugmentConfig, generator: Callable[[str], np.random.Generator]) -> np.ndarray:
    """RandAugment and colour jitter, in timm's order, as far as they are on: uint8 (height, width, channels) to that.

    `generator` gives the example's own generator of a stream, and is asked only for those that are used.
    """
    if not config.distorts:
        return pixels
    image = to_image(pixels)
    if config.rand_augment is not None:
        draws = generator("rand_augment")
        image = rand_augment(image, config.rand_augment, config.rand_augment_std, fill_colour(config.mean), draws)
    if config.color_jitter:
        image = color_jitter(image, config.color_jitter, generator("jitter"))
    return to_array(image)
