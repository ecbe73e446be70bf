"""The bundled digits against scikit-learn's."""

import numpy as np
from sklearn.datasets import load_digits

from mae_jax.data.images.decode import to_array
from mae_jax.data.sources.source import open_source
from tests.refusals import refused


def test_they_are_scikit_learns_digits() -> None:
    expected = load_digits()
    source = open_source("digits", 1)
    images = np.stack([to_array(source.load(i)) for i in range(len(source))])
    assert images.shape == (1797, 8, 8, 1)
    assert images.dtype == np.uint8
    assert images.max() == 255
    np.testing.assert_array_equal(np.rint(images[..., 0] * (16 / 255)), expected.images)
    assert [source.label(i) for i in range(len(source))] == expected.target.tolist()
    assert source.class_names == tuple(map(str, expected.target_names))


def test_as_rgb_all_channels_are_equal() -> None:
    rgb = to_array(open_source("digits", 3).load(17))
    assert rgb.shape == (8, 8, 3)
    assert (rgb == to_array(open_source("digits", 1).load(17))).all()


def test_name_and_splits() -> None:
    assert open_source("digits", 1).name(17) == "digits[17]"
    with refused("split", "no split 'val'"):
        open_source("digits", 1, "val")
