"""Colour jitter as torchvision does it, and RandAugment (Cubuk et al. 2019) as timm does it: `rand-m*-mstd*-inc1`,
the recipe of He et al. 2021, Table 9. Imported only where one of them is on.

Of timm's 15 operations, all of which do more the larger the magnitude, two are drawn for each image, with replacement;
each is applied half of the time, at a magnitude of its own. A level is the magnitude as a share of 10; signed ones go
either way. Everything is Pillow's, on grey or RGB images of bytes; what an operation brings in from beyond the image is
filled with one colour.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mae_jax.config import AugmentConfig
from mae_jax.data.images.decode import to_array, to_image

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def distort(pixels: np.ndarray, config: AugmentConfig, generator: Callable[[str], np.random.Generator]) -> np.ndarray:
    """Apply RandAugment and colour jitter, in timm's order, as far as they are on, to uint8 (height, width, channels).

    `generator` gives the example's own generator of a stream, and is asked only for those that are used.
    """
    image = to_image(pixels)
    if config.rand_augment is not None:
        draws = generator("rand_augment")
        image = rand_augment(image, config.rand_augment, config.rand_augment_std, fill_colour(config.mean), draws)
    if config.color_jitter:
        image = color_jitter(image, config.color_jitter, generator("jitter"))
    return to_array(image)


def color_jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Change brightness, contrast and saturation, in random order, each by a random factor.

    It is uniform in 1 - strength .. 1 + strength, and never below 0. A grey image has no saturation to change.
    """
    order = rng.permutation(len(_ENHANCERS))
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, len(_ENHANCERS))
    for which in order:
        image = _ENHANCERS[which](image).enhance(float(factors[which]))
    return image


Fill = tuple[int, ...]

_MAX_MAGNITUDE = 10.0


def fill_colour(mean: Sequence[float]) -> Fill:
    """Return the mean of the data in bytes, which timm's `create_transform` fills with."""
    return tuple(min(255, max(0, round(255 * value))) for value in mean)


def _auto_contrast(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    return ImageOps.equalize(image)


def _invert(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    return ImageOps.invert(image)


def _rotate(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    """Turn by up to 30 degrees."""
    return image.rotate(level * 30.0, resample=Image.Resampling.BICUBIC, fillcolor=fill)


def _posterize(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    """Keep 4 .. 0 bits; at the largest magnitude none is left, and the image is black.

    Not Pillow's: from version 13 on it refuses 0 bits, and timm's operation with it.
    """
    kept = 0xFF << (4 + int(level * 4)) & 0xFF
    return _mapped(image, [value & kept for value in range(256)])


def _solarize(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    """Invert bytes from a threshold on, 256 .. 0."""
    return ImageOps.solarize(image, 256 - int(level * 256))


def _solarize_add(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    """Add up to 110 to bytes under 128."""
    added = int(level * 110)
    return _mapped(image, [min(255, value + added) if value < 128 else value for value in range(256)])


def _mapped(image: Image.Image, table: list[int]) -> Image.Image:
    """Replace each byte by the table's, in every channel."""
    return image.point(table * len(image.getbands()))


def _factor(level: float) -> float:
    """Return the factor of an enhancement, 0.1 .. 1.9: 1 changes nothing."""
    return max(0.1, 1.0 + level * 0.9)


def _color(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    """Change the saturation; a grey image stays as it is."""
    return ImageEnhance.Color(image).enhance(_factor(level))


def _contrast(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(_factor(level))


def _brightness(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(_factor(level))


def _sharpness(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(_factor(level))


def _affine(image: Image.Image, rows: tuple[float, ...], fill: Fill) -> Image.Image:
    """Take pixel (x, y) from (a x + b y + c, d x + e y + f); rows are a .. f."""
    return image.transform(image.size, Image.Transform.AFFINE, rows, resample=Image.Resampling.BICUBIC, fillcolor=fill)


def _shear_x(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    return _affine(image, (1, level * 0.3, 0, 0, 1, 0), fill)


def _shear_y(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    return _affine(image, (1, 0, 0, level * 0.3, 1, 0), fill)


def _translate_x(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    """Move by up to 0.45 of the width."""
    return _affine(image, (1, 0, level * 0.45 * image.width, 0, 1, 0), fill)


def _translate_y(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    """Move by up to 0.45 of the height."""
    return _affine(image, (1, 0, 0, 0, 1, level * 0.45 * image.height), fill)


class Operation(NamedTuple):
    """One way to alter an image."""

    name: str  # timm's
    signed: bool
    apply: Callable[[Image.Image, float, Fill], Image.Image]  # image, level 0 .. 1 or -1 .. 1, colour to fill with


# In timm's order (`_RAND_INCREASING_TRANSFORMS` of timm.data.auto_augment).
OPERATIONS = (
    Operation("AutoContrast", False, _auto_contrast),
    Operation("Equalize", False, _equalize),
    Operation("Invert", False, _invert),
    Operation("Rotate", True, _rotate),
    Operation("PosterizeIncreasing", False, _posterize),
    Operation("SolarizeIncreasing", False, _solarize),
    Operation("SolarizeAdd", False, _solarize_add),
    Operation("ColorIncreasing", True, _color),
    Operation("ContrastIncreasing", True, _contrast),
    Operation("BrightnessIncreasing", True, _brightness),
    Operation("SharpnessIncreasing", True, _sharpness),
    Operation("ShearX", True, _shear_x),
    Operation("ShearY", True, _shear_y),
    Operation("TranslateXRel", True, _translate_x),
    Operation("TranslateYRel", True, _translate_y),
)


def rand_augment(
    image: Image.Image, magnitude: float, deviation: float, fill: Fill, rng: np.random.Generator
) -> Image.Image:
    """Apply two operations in a row, at magnitudes that are normal around `magnitude` and clipped to 0 .. 10.

    The draws come in timm's order: both operations, then for each whether, how much, and the sign where there is one.
    """
    for which in rng.integers(len(OPERATIONS), size=2):
        operation = OPERATIONS[which]
        if rng.random() > 0.5:
            continue
        level = min(_MAX_MAGNITUDE, max(0.0, rng.normal(magnitude, deviation))) / _MAX_MAGNITUDE
        if operation.signed and rng.random() > 0.5:
            level = -level
        image = operation.apply(image, level, fill)
    return image
