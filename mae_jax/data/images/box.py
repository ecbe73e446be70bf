"""Which part of an image a position shows, and whether it is turned: numbers alone, no pixels.

A box is drawn from the size of the whole image, before anything is decoded, so that decoding can spare what is not
shown. Random numbers come from the example's own generators (`rng.host_generator`).
"""

import math

import numpy as np

from mae_jax.config import AugmentConfig

Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels, as Pillow counts


def choose_box(
    size_hw: tuple[int, int], config: AugmentConfig, image_hw: tuple[int, int], crop: np.random.Generator
) -> Box:
    """Return the part of an image of `size_hw` that is shown as `image_hw`; `crop` draws it where it is random."""
    if config.crop == "random":
        return random_resized_crop_box(crop, *size_hw, config.scale, config.ratio)
    if config.crop == "fixed":
        return fixed_size_crop_box(crop, size_hw, image_hw)
    return center_box(size_hw, image_hw)


def flips(config: AugmentConfig, flip: np.random.Generator) -> bool:
    """Return whether an example is turned left to right."""
    return config.flip and flip.random() < 0.5


def random_resized_crop_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw a part of random size and shape: torchvision's `RandomResizedCrop` (Szegedy et al. 2014, section 6).

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


def fixed_size_crop_box(rng: np.random.Generator, size_hw: tuple[int, int], image_hw: tuple[int, int]) -> Box:
    """Draw a part of fixed size: `image_hw` of an image scaled to just cover 8/7 of it (He et al. 2021, Table 1e).

    For 224 that is torchvision's `Resize(256)` and `RandomCrop(224)`.
    """
    scaled = covering_size(size_hw, (round(image_hw[0] * 8 / 7), round(image_hw[1] * 8 / 7)))
    corner = int(rng.integers(scaled[0] - image_hw[0] + 1)), int(rng.integers(scaled[1] - image_hw[1] + 1))
    return _box_of_scaled(size_hw, scaled, corner, image_hw)


def center_box(size_hw: tuple[int, int], image_hw: tuple[int, int], share: float = 1.0) -> Box:
    """Return the middle of an image: `image_hw` once it is scaled to just cover `image_hw` / `share`."""
    scaled = covering_size(size_hw, (int(image_hw[0] / share), int(image_hw[1] / share)))
    corner = round((scaled[0] - image_hw[0]) / 2), round((scaled[1] - image_hw[1]) / 2)
    return _box_of_scaled(size_hw, scaled, corner, image_hw)


def covering_size(size_hw: tuple[int, int], least_hw: tuple[int, int]) -> tuple[int, int]:
    """Return the size of an image once it is scaled to just cover `least_hw`: torchvision's `Resize` for a square."""
    (height, width), (source_h, source_w) = least_hw, size_hw
    if height * source_w >= width * source_h:
        return height, height * source_w // source_h
    return width * source_h // source_w, width


def scale_box(box: Box, from_hw: tuple[int, int], to_hw: tuple[int, int]) -> Box:
    """Return the same part of an image once it is scaled from one size to another, in each direction by itself."""
    down, across = to_hw[0] / from_hw[0], to_hw[1] / from_hw[1]
    return box[0] * across, box[1] * down, box[2] * across, box[3] * down


def _box_of_scaled(
    size_hw: tuple[int, int], scaled_hw: tuple[int, int], corner: tuple[int, int], image_hw: tuple[int, int]
) -> Box:
    """Return what shows where `image_hw` is cut, from `corner` (top, left) on, out of the image once it is scaled."""
    (source_h, source_w), (scaled_h, scaled_w), (top, left), (height, width) = size_hw, scaled_hw, corner, image_hw
    return (
        left * source_w / scaled_w,
        top * source_h / scaled_h,
        (left + width) * source_w / scaled_w,
        (top + height) * source_h / scaled_h,
    )
