"""Crops on the device against Pillow's crops of the same boxes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mae_jax.data.images.box import random_resized_crop_box
from mae_jax.data.images.decode import Decoded
from mae_jax.data.images.resize import resize_part
from mae_jax.train.crops import box_weights, crop_images
from mae_jax.train.objective import Batch
from mae_jax.train.step import make_step
from tests.data.photographs import photograph

crop_images = jax.jit(crop_images, static_argnums=2)


def test_equals_pillow_to_a_rounding() -> None:
    photos = np.stack([photograph(64, 64, seed) for seed in range(70)])  # more than are cropped at a time
    boxes = [random_resized_crop_box(np.random.default_rng(i), 64, 64, (0.2, 1.0), (3 / 4, 4 / 3)) for i in range(70)]
    flips = np.arange(70) % 2
    crops = np.concatenate([np.array(boxes), flips[:, None]], axis=1).astype(np.float32)
    found = np.asarray(crop_images(photos, crops, (48, 40)))
    expected = np.stack(
        [resize_part(Decoded(Image.fromarray(photo)), box, (48, 40)) for photo, box in zip(photos, boxes, strict=True)]
    )
    expected = np.where(flips[:, None, None, None] > 0, expected[:, :, ::-1], expected)
    off = np.abs(found.astype(int) - expected)
    assert off.max() <= 1  # Pillow's weights are rounded to 22 bits
    assert (off == 0).mean() > 0.98


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.floats(0.05, 1), st.floats(0.05, 1))
def test_fractions_of_pixels(seed: int, wide: float, high: float) -> None:
    photo = photograph(50, 50, seed)
    rng = np.random.default_rng(seed)
    left, top = rng.uniform(0, 50 * (1 - wide)), rng.uniform(0, 50 * (1 - high))
    box = (left, top, left + 50 * wide, top + 50 * high)
    found = np.asarray(crop_images(photo[None], np.float32([[*box, 0]]), (32, 32)))[0]
    off = np.abs(found.astype(int) - resize_part(Decoded(Image.fromarray(photo)), box, (32, 32)))
    assert off.mean() < 0.5


def test_nothing_beyond_the_crop_is_read() -> None:
    image = np.full((1, 32, 32, 3), 255, np.uint8)
    image[:, 8:24, 4:20] = 7
    assert (np.asarray(crop_images(image, np.float32([[4, 8, 20, 24, 0]]), (24, 24))) == 7).all()


def test_the_whole_is_left_as_it_is() -> None:
    photo = photograph(32, 32)
    assert (np.asarray(crop_images(photo[None], np.float32([[0, 0, 32, 32, 0]]), (32, 32)))[0] == photo).all()
    assert (np.asarray(crop_images(photo[None], np.float32([[0, 0, 32, 32, 1]]), (32, 32)))[0] == photo[:, ::-1]).all()


@pytest.mark.parametrize(("start", "stop"), [(0.0, 40.0), (3.0, 5.0), (39.0, 40.0), (0.5, 31.25)])
def test_weights_sum_to_one(start: float, stop: float) -> None:
    weights = np.asarray(box_weights(jnp.float32(start), jnp.float32(stop), 40, 16))
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    assert (weights[:, : int(start)] == 0).all()
    assert (weights[:, int(np.ceil(stop)) :] == 0).all()


def test_a_step_sees_the_same_crops(tiny, begin) -> None:
    """The loss of crops cut in the step is that of the same crops cut before it."""
    config = tiny(batch_size=4, crops="device", canvas_size=12)
    photos = np.stack([photograph(12, 12, seed)[..., :1] for seed in range(4)])
    crops = np.float32([[0, 0, 12, 12, 0], [3, 5, 11, 12, 1], [2, 0, 12, 7, 0], [1, 2, 6, 9, 1]])
    positions = np.arange(4, dtype=np.uint32)
    step = jax.jit(make_step(config, steps_per_epoch=10, epochs=1))
    losses = []
    for batch in (Batch(photos, positions, crops), Batch(np.asarray(crop_images(photos, crops, (8, 8))), positions)):
        _, metrics = step(begin(config), batch)
        losses.append(float(metrics.loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
