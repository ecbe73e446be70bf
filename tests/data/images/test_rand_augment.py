"""RandAugment against timm's: each operation, and whole images given the same draws, equal to the bit."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mae_jax.config import IMAGENET_MEAN
from mae_jax.data.images.distort import OPERATIONS, fill_colour, rand_augment
from mae_jax.rng import host_generator
from tests.data.photographs import photograph
from tests.peers import peer

PHOTO = Image.fromarray(photograph(30, 41))
IMAGES = {
    "photograph": PHOTO,
    "grey": PHOTO.convert("L"),
    "noise": Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)),
    "one colour": Image.new("RGB", (9, 8), (3, 130, 255)),
    "one grey": Image.new("L", (9, 8), 77),
}
MEANS = {"RGB": IMAGENET_MEAN, "L": (0.305,)}


@pytest.fixture(scope="module")
def auto_augment():
    return peer("timm.data.auto_augment")


def make_timm(mean, size=24, config="rand-m9-mstd0.5-inc1"):
    """The RandAugment in timm's own training transforms, with their colour to fill with and their interpolation."""
    transforms = peer("timm.data.transforms_factory").transforms_imagenet_train(
        size, auto_augment=config, interpolation="bicubic", mean=mean, std=mean, color_jitter=None
    )
    (found,) = (part for part in transforms.transforms if type(part).__name__ == "RandAugment")
    return found


def test_the_operations_are_timms(auto_augment):
    assert [operation.name for operation in OPERATIONS] == auto_augment._RAND_INCREASING_TRANSFORMS
    assert [op.name for op in make_timm(IMAGENET_MEAN).ops] == [operation.name for operation in OPERATIONS]


def posterize(image: Image.Image, bits: int) -> Image.Image:
    """ImageOps.posterize of Pillow 12, which takes 0 bits as well."""
    mask = ~(2 ** (8 - bits) - 1)
    return image.point([i & mask for i in range(256)] * len(image.getbands()))


@given(st.integers(1, 8))
def test_posterizing_is_pillows_where_it_does_it(bits):
    for image in IMAGES.values():
        assert (np.asarray(posterize(image, bits)) == np.asarray(ImageOps.posterize(image, bits))).all()


def signed(sign, drawn):
    """A `random.random` that lets timm take this sign, and notes that it was called."""

    def random():
        drawn.append(sign)
        return 0.5 - sign / 4

    return random


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
@pytest.mark.parametrize("kind", IMAGES)
def test_an_operation_is_timms(auto_augment, monkeypatch, operation, kind):
    image = IMAGES[kind]
    mean = MEANS[image.mode]
    fill = fill_colour(mean)
    (theirs,) = (op for op in make_timm(mean).ops if op.name == operation.name)
    theirs.prob, theirs.magnitude_std = 1.0, 0
    drawn = []
    monkeypatch.setattr(auto_augment.ImageOps, "posterize", posterize)
    for magnitude in (0.0, 0.3, 1.0, 2.5, 4.9, 5.0, 7.77, 8.5, 9.0, 9.99, 10.0):
        for sign in (1, -1):
            theirs.magnitude = magnitude
            monkeypatch.setattr(auto_augment, "random", SimpleNamespace(random=signed(sign, drawn)))
            level = magnitude / 10 * (sign if operation.signed else 1)
            found, expected = operation.apply(image, level, fill), theirs(image)
            assert found.mode == expected.mode == image.mode
            assert (np.asarray(found) == np.asarray(expected)).all(), (magnitude, sign)
    assert bool(drawn) == operation.signed


@pytest.mark.parametrize("magnitude", [3, 9])
@pytest.mark.parametrize("kind", ["photograph", "grey"])
def test_images_are_timms_given_the_same_draws(auto_augment, monkeypatch, kind, magnitude):
    image = IMAGES[kind]
    mean = MEANS[image.mode]
    theirs, changed = make_timm(mean, config=f"rand-m{magnitude}-mstd0.5-inc1"), 0
    monkeypatch.setattr(auto_augment.ImageOps, "posterize", posterize)
    for position in range(200):
        draws = host_generator(0, "rand_augment", position)

        def choose(ops, count, replace, p, draws=draws):
            assert replace
            assert p is None
            return [ops[i] for i in draws.integers(len(ops), size=count)]

        monkeypatch.setattr(auto_augment, "random", SimpleNamespace(random=draws.random, gauss=draws.normal))
        monkeypatch.setattr(auto_augment, "np", SimpleNamespace(random=SimpleNamespace(choice=choose)))
        own = host_generator(0, "rand_augment", position)
        found = np.asarray(rand_augment(image, float(magnitude), 0.5, fill_colour(mean), own))
        assert (found == np.asarray(theirs(image))).all()
        assert own.random() == draws.random()  # as many draws
        changed += (found != np.asarray(image)).any()
    assert 100 < changed < 170  # a quarter is left alone, and some operations change nothing


def test_a_grey_image_has_no_colour_to_change():
    (color,) = (operation for operation in OPERATIONS if operation.name == "ColorIncreasing")
    grey = IMAGES["grey"]
    for level in (-1.0, -0.3, 0.5, 1.0):
        assert (np.asarray(color.apply(grey, level, (128,))) == np.asarray(grey)).all()


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=3))
def test_a_fill_is_a_colour(mean):
    fill = fill_colour(mean)
    assert len(fill) == len(mean)
    assert all(0 <= value <= 255 for value in fill)


def test_the_fill_of_imagenet():
    assert fill_colour(IMAGENET_MEAN) == make_timm(IMAGENET_MEAN).ops[0].kwargs["fillcolor"] == (124, 116, 104)
