"""Crops against torchvision's algorithm, written out here, and against Pillow."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from mae_jax.config import AugmentConfig
from mae_jax.data.images.box import center_box, covering_size, fixed_size_crop_box, random_resized_crop_box, scale_box
from mae_jax.data.images.decode import Decoded, to_array, to_image
from mae_jax.data.images.distort import color_jitter, distort, rand_augment
from mae_jax.data.images.resize import center_crop, resize_part
from mae_jax.data.stream import augment
from mae_jax.rng import host_generator
from tests.data.photographs import photograph

PHOTO = Image.fromarray(photograph(90, 131))
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def torchvision_params(draws, height, width, scale, ratio):
    """RandomResizedCrop.get_params of torchvision 0.20 with its random numbers from `draws`: i, j, h, w."""
    area = height * width
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(10):
        target_area = area * draws.uniform(scale[0], scale[1])
        aspect_ratio = math.exp(draws.uniform(log_ratio[0], log_ratio[1]))
        w = int(round(math.sqrt(target_area * aspect_ratio)))  # noqa: RUF046
        h = int(round(math.sqrt(target_area / aspect_ratio)))  # noqa: RUF046
        if 0 < w <= width and 0 < h <= height:
            i = int(draws.integers(0, height - h + 1))
            j = int(draws.integers(0, width - w + 1))
            return i, j, h, w
    in_ratio = float(width) / float(height)
    if in_ratio < min(ratio):
        w = width
        h = int(round(w / min(ratio)))  # noqa: RUF046
    elif in_ratio > max(ratio):
        h = height
        w = int(round(h * max(ratio)))  # noqa: RUF046
    else:
        w = width
        h = height
    return (height - h) // 2, (width - w) // 2, h, w


sides = st.integers(1, 3000)


@given(st.integers(0, 2**32 - 1), sides, sides)
@example(0, 1, 1)
@example(0, 1, 3000)
@example(0, 3000, 1)
def test_box_is_inside_and_torchvisions(seed: int, height: int, width: int) -> None:
    left, top, right, bottom = random_resized_crop_box(np.random.default_rng(seed), height, width, SCALE, RATIO)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    expected = torchvision_params(np.random.default_rng(seed), height, width, SCALE, RATIO)
    assert (top, left, bottom - top, right - left) == expected


@given(st.integers(0, 2**32 - 1), st.integers(50, 500), st.integers(50, 500))
def test_box_keeps_scale_and_ratio(seed: int, height: int, width: int) -> None:
    left, top, right, bottom = random_resized_crop_box(np.random.default_rng(seed), height, width, SCALE, RATIO)
    w, h = right - left, bottom - top
    if 3 / 4 < width / height < 4 / 3:  # else the fallback may be smaller
        assert 0.2 * height * width - (w + h) / 2 - 1 <= w * h <= height * width
    assert (w + 0.5) / (h - 0.5) >= 3 / 4
    assert (w - 0.5) / (h + 0.5) <= 4 / 3


def test_box_is_spread_evenly() -> None:
    boxes = np.array(
        [random_resized_crop_box(host_generator(1, "crop", i), 400, 400, SCALE, RATIO) for i in range(4000)]
    )
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert abs(np.mean(boxes[:, 0] + boxes[:, 2]) / 2 - 200) < 3
    assert abs(np.mean(boxes[:, 1] + boxes[:, 3]) / 2 - 200) < 3
    assert abs(np.mean(np.log(w / h))) < 0.01
    assert 0.2 <= np.min(w * h) / 160_000 < 0.21


def test_a_long_image_falls_back_to_its_middle() -> None:
    assert random_resized_crop_box(np.random.default_rng(0), 10, 1000, (1, 1), RATIO) == (493, 0, 506, 10)
    assert random_resized_crop_box(np.random.default_rng(0), 1000, 10, (1, 1), RATIO) == (0, 493, 10, 506)


@pytest.mark.parametrize("image_hw", [(32, 32), (16, 48), (200, 100)])
def test_resized_crop_is_pillows(image_hw: tuple[int, int]) -> None:
    box = (11, 5, 101, 77)
    expected = PHOTO.crop(box).resize((image_hw[1], image_hw[0]), Image.BICUBIC)
    assert resize_part(Decoded(PHOTO), box, image_hw).tobytes() == np.asarray(expected).tobytes()
    assert resize_part(Decoded(PHOTO), box, image_hw).shape == (*image_hw, 3)


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    small = resize_part(Decoded(Image.fromarray(stripes)), (0, 0, 64, 64), (8, 8))
    assert np.abs(small.astype(int) - 127.5).max() < 10


def test_nothing_is_resampled_where_the_size_fits() -> None:
    whole = (0, 0, *PHOTO.size)
    assert (resize_part(Decoded(PHOTO), whole, (90, 131)) == np.asarray(PHOTO)).all()
    assert (to_array(center_crop(PHOTO, (90, 131))) == np.asarray(PHOTO)).all()
    assert (to_array(center_crop(PHOTO, (90, 90))) == np.asarray(PHOTO)[:, 20:110]).all()


@given(sides, sides, st.sampled_from([(8, 8), (8, 20), (24, 10)]))
def test_center_crop_has_the_size(height: int, width: int, image_hw: tuple[int, int]) -> None:
    assert to_array(center_crop(Image.new("L", (width, height)), image_hw)).shape == (*image_hw, 1)


def torchvision_resized_hw(height: int, width: int, size: int) -> tuple[int, int]:
    """_compute_resized_output_size of torchvision 0.20 for one number."""
    short, long = min(height, width), max(height, width)
    new_long = int(size * long / short)
    return (new_long, size) if width <= height else (size, new_long)


SHAPES = [(90, 131), (131, 90), (60, 61), (33, 200), (30, 30)]


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize(("share", "scaled"), [(1.0, 32), (0.875, 36), (0.8, 40)])
def test_center_crop_is_torchvisions(height: int, width: int, share: float, scaled: int) -> None:
    image = Image.fromarray(photograph(height, width))
    size = 32
    new_h, new_w = torchvision_resized_hw(height, width, scaled)
    whole = np.asarray(image.resize((new_w, new_h), Image.BICUBIC)).astype(int)
    top, left = round((new_h - size) / 2.0), round((new_w - size) / 2.0)
    expected = whole[top : top + size, left : left + size]
    # The kernel's weights come out of the same numbers in another order: a rounding here and there.
    assert np.abs(to_array(center_crop(image, (size, size), share)) - expected).max() <= 1


@given(sides, sides, st.sampled_from([8, 32, 224, 256]))
@example(49, 98, 32)  # float arithmetic in another order gives 63
def test_the_covering_size_is_torchvisions(height: int, width: int, size: int) -> None:
    assert covering_size((height, width), (size, size)) == torchvision_resized_hw(height, width, size)


@given(sides, sides, st.integers(1, 300), st.integers(1, 300))
def test_the_covering_size_just_covers(height: int, width: int, least_h: int, least_w: int) -> None:
    rows, columns = covering_size((height, width), (least_h, least_w))
    assert rows >= least_h
    assert columns >= least_w
    assert rows == least_h or columns == least_w
    assert abs(rows * width - columns * height) <= max(height, width)  # the shape is kept but for less than a pixel


def test_an_evaluation_crop_of_seven_eighths_is_224_of_256() -> None:
    assert center_box((256, 256), (224, 224), 0.875) == (16, 16, 240, 240)
    assert center_box((256, 512), (224, 224), 0.875) == (144, 16, 368, 240)


@given(st.integers(0, 2**32 - 1), sides, sides, st.sampled_from([(8, 8), (224, 224), (24, 10), (1, 1)]))
@example(0, 1, 3000, (8, 8))
def test_a_fixed_box_is_torchvisions(seed: int, height: int, width: int, image_hw: tuple[int, int]) -> None:
    left, top, right, bottom = fixed_size_crop_box(np.random.default_rng(seed), (height, width), image_hw)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    rows, columns = covering_size((height, width), (round(image_hw[0] * 8 / 7), round(image_hw[1] * 8 / 7)))
    draws = np.random.default_rng(seed)  # RandomCrop.get_params: the row first
    i, j = draws.integers(0, rows - image_hw[0] + 1), draws.integers(0, columns - image_hw[1] + 1)
    scaled = np.array([left * columns / width, top * rows / height, right * columns / width, bottom * rows / height])
    np.testing.assert_allclose(scaled, [j, i, j + image_hw[1], i + image_hw[0]], rtol=1e-12, atol=1e-9)


def test_fixed_boxes_reach_all_corners_evenly() -> None:
    boxes = np.array([fixed_size_crop_box(host_generator(1, "crop", i), (256, 300), (224, 224)) for i in range(4000)])
    assert (boxes[:, 2:] - boxes[:, :2] == 224).all()
    assert np.bincount(boxes[:, 1].astype(int), minlength=33).min() > 60  # of 4000 / 33
    assert np.bincount(boxes[:, 0].astype(int), minlength=77).min() > 20  # of 4000 / 77


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_a_fixed_crop_is_cut_from_the_scaled_image(height: int, width: int) -> None:
    photo, config = Image.fromarray(photograph(height, width)), AugmentConfig(crop="fixed", flip=False)
    rows, columns = torchvision_resized_hw(height, width, 32)
    whole = np.asarray(photo.resize((columns, rows), Image.BICUBIC)).astype(int)
    for position in range(8):
        draws = host_generator(0, "crop", position)
        i, j = draws.integers(0, rows - 28 + 1), draws.integers(0, columns - 28 + 1)
        image = augment(Decoded(photo), config, (28, 28), draws_of(position))
        assert np.abs(image - whole[i : i + 28, j : j + 28]).max() <= 1


def draws_of(position: int) -> Callable[[str], np.random.Generator]:
    return partial(host_generator, 0, position=position)


def test_augment_is_the_crop_and_then_the_flip() -> None:
    config = AugmentConfig()
    flipped = 0
    for position in range(40):
        box = random_resized_crop_box(host_generator(0, "crop", position), 90, 131, config.scale, config.ratio)
        crop = resize_part(Decoded(PHOTO), box, (24, 24))
        image = augment(Decoded(PHOTO), config, (24, 24), draws_of(position))
        mirrored = host_generator(0, "flip", position).random() < 0.5
        flipped += mirrored
        assert (image == (crop[:, ::-1] if mirrored else crop)).all()
        assert (augment(Decoded(PHOTO), config, (24, 24), draws_of(position)) == image).all()
    assert 10 < flipped < 30


def test_no_augmentation() -> None:
    config = AugmentConfig(crop="center", flip=False)
    assert (augment(Decoded(PHOTO), config, (24, 24), draws_of(3)) == to_array(center_crop(PHOTO, (24, 24)))).all()


def test_grey_has_one_channel() -> None:
    assert augment(Decoded(PHOTO.convert("L")), AugmentConfig(), (24, 16), draws_of(3)).shape == (24, 16, 1)


def test_nothing_is_drawn_for_what_is_off() -> None:
    asked: list[str] = []

    def generator(stream: str) -> np.random.Generator:
        asked.append(stream)
        return host_generator(0, stream, 0)

    for config in (AugmentConfig(flip=False), AugmentConfig(color_jitter=0.4), AugmentConfig(rand_augment=9.0)):
        augment(Decoded(PHOTO), config, (24, 24), generator)
    assert asked == ["crop", "flip", "crop", "flip", "jitter", "crop", "flip", "rand_augment"]


@pytest.mark.parametrize("channels", [1, 3])
def test_distortion_is_rand_augment_and_then_jitter(channels: int) -> None:
    pixels, mean = np.asarray(PHOTO)[..., :channels], (0.2, 0.5, 0.9)[:channels]
    changed = 0
    for position in range(10):
        config = AugmentConfig(rand_augment=9.0, rand_augment_std=2.0, color_jitter=0.3, mean=mean, std=mean)
        draws = host_generator(0, "rand_augment", position)
        first = rand_augment(to_image(pixels), 9.0, 2.0, (51, 128, 230)[:channels], draws)
        expected = to_array(color_jitter(first, 0.3, host_generator(0, "jitter", position)))
        found = distort(pixels, config, partial(host_generator, 0, position=position))
        assert found.shape == pixels.shape
        assert found.dtype == np.uint8
        assert (found == expected).all()
        changed += (found != pixels).any()
    assert changed == 10


def test_a_box_is_scaled_in_each_direction_by_itself():
    assert scale_box((10, 20, 30, 60), (100, 200), (50, 20)) == (1.0, 10.0, 3.0, 30.0)
