"""Colour jitter (He et al. 2021, Table 1e): torchvision's `ColorJitter` on Pillow images, without hue."""

import numpy as np
from PIL import Image, ImageEnhance

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def color_jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation, in random order, each by a factor uniform in 1 - strength .. 1 + strength.

    A factor is never below 0. A grey image has no saturation to change.
    """
    order = rng.permutation(len(_ENHANCERS))
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, len(_ENHANCERS))
    for which in order:
        image = _ENHANCERS[which](image).enhance(float(factors[which]))
    return image
