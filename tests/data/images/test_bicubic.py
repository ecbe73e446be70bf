"""Bicubic by sparse products against Pillow's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mae_jax.data.images.resize import bicubic_weights, resize_bicubic
from tests.data.photographs import photograph

SIDES = st.integers(1, 200)


def pillow(pixels: np.ndarray, image_hw: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return np.asarray(image.resize(image_hw[::-1], Image.Resampling.BICUBIC)).reshape(*image_hw, -1)


@settings(max_examples=100)
@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from([1, 3]), st.integers(0, 2**31))
def test_equals_pillow_bit_for_bit(h: int, w: int, out_h: int, out_w: int, channels: int, seed: int) -> None:
    """Noise, which runs over at both ends of a byte; enlarged and shrunk, in either direction."""
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, channels), np.uint8)
    assert (resize_bicubic(pixels, (out_h, out_w)) == pillow(pixels, (out_h, out_w))).all()


@pytest.mark.parametrize("size_hw", [(375, 500), (500, 333), (120, 90), (224, 300), (224, 224)])
def test_parts_of_a_picture_at_the_models_size(size_hw: tuple[int, int]) -> None:
    part = photograph(510, 520)[7 : 7 + size_hw[0], 11 : 11 + size_hw[1]]
    found = resize_bicubic(part, (224, 224))
    assert (found == pillow(np.ascontiguousarray(part), (224, 224))).all()
    assert not np.shares_memory(found, part)


def test_weights_of_a_pixel_sum_to_one() -> None:
    for size, out in ((5, 40), (40, 40), (333, 224), (500, 7)):
        np.testing.assert_allclose(bicubic_weights(size, out).sum(axis=1), 2**22, atol=60)
