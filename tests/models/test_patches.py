"""Cutting into patches and putting them back: the authors' order, and exact inverses for every shape."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_jax.models import patches as module

# Without the check of signatures, NumPy arrays go through the same code, and nothing is compiled for each shape.
patchify, unpatchify = map(inspect.unwrap, (module.patchify, module.unpatchify))

sides = st.integers(1, 6)
pairs = st.tuples(sides, sides)


def numbered(*shape):
    """An image whose every value is another one."""
    return np.arange(np.prod(shape)).reshape(shape)


@given(grid=pairs, patch=pairs, channels=st.sampled_from([1, 3, 4, 12]), batch=st.integers(1, 3))
def test_unpatchify_undoes_patchify(grid, patch, channels, batch):
    images = numbered(batch, grid[0] * patch[0], grid[1] * patch[1], channels)
    patches = patchify(images, patch)
    assert patches.shape == (batch, grid[0] * grid[1], patch[0] * patch[1] * channels)
    np.testing.assert_array_equal(unpatchify(patches, grid, patch), images)


@given(grid=pairs, patch=pairs, channels=st.sampled_from([1, 3, 4, 12]), batch=st.integers(1, 3))
def test_patchify_undoes_unpatchify(grid, patch, channels, batch):
    patches = numbered(batch, grid[0] * grid[1], patch[0] * patch[1] * channels)
    np.testing.assert_array_equal(patchify(unpatchify(patches, grid, patch), patch), patches)


@given(grid=pairs, patch=pairs)
def test_a_patch_is_the_slice_of_the_image_at_its_place(grid, patch):
    images = numbered(1, grid[0] * patch[0], grid[1] * patch[1], 3)
    patches = patchify(images, patch)
    for index in range(grid[0] * grid[1]):
        row, column = index // grid[1] * patch[0], index % grid[1] * patch[1]
        here = images[0, row : row + patch[0], column : column + patch[1]]
        np.testing.assert_array_equal(patches[0, index], here.ravel())


def test_the_order_of_values():
    """Written out: patches row by row; inside one row, column, channel. Values are 100 row + 10 column + channel."""
    row, column, channel = np.ogrid[:4, :4, :2]
    patches = patchify((100 * row + 10 * column + channel)[None], (2, 2))
    assert patches[0].tolist() == [
        [0, 1, 10, 11, 100, 101, 110, 111],
        [20, 21, 30, 31, 120, 121, 130, 131],
        [200, 201, 210, 211, 300, 301, 310, 311],
        [220, 221, 230, 231, 320, 321, 330, 331],
    ]


def test_images_that_are_no_whole_number_of_patches_are_refused():
    with pytest.raises(ValueError, match=r"8 x 9 pixels .* \(4, 4\)"):
        patchify(numbered(1, 8, 9, 3), (4, 4))


@pytest.mark.parametrize(("count", "values"), [(5, 12), (4, 13)])
def test_patches_that_do_not_fit_the_grid_are_refused(count, values):
    with pytest.raises(ValueError, match=rf"{count} patches of {values} values .* \(2, 2\) patches of \(2, 2\)"):
        unpatchify(numbered(1, count, values), (2, 2), (2, 2))


def test_jax_arrays_are_cut_alike():
    images = numbered(2, 6, 8, 3).astype(np.float32)
    patches = module.patchify(jnp.asarray(images), (3, 2))
    np.testing.assert_array_equal(patches, patchify(images, (3, 2)))
    np.testing.assert_array_equal(module.unpatchify(patches, (2, 4), (3, 2)), images)
