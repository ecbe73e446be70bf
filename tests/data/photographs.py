"""Pixels that look enough like a photograph."""

import numpy as np
from PIL import Image


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise, uint8 (height, width, 3): compresses like a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + rng.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)
