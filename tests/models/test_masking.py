"""Masks: a function of their noise row alone, and always of the same size."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mae_jax.config import ModelConfig, TransformerConfig
from mae_jax.models.masking import block_scores, grid_scores, keep_smallest, make_mask

NARROW = TransformerConfig(width=8, depth=1, heads=2)
KINDS = {
    "random": {"mask_ratio": 0.7},
    "block": {"masking": "block", "mask_ratio": 0.5},
    "grid": {"masking": "grid", "mask_ratio": 0.75},
}


def config(image=(24, 32), **changes):
    """6 x 8 patches."""
    return ModelConfig(image_size=image, patch_size=4, encoder=NARROW, decoder=NARROW, **changes)


def noise(batch, length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).random((batch, length), np.float32))


compiled_mask = jax.jit(make_mask, static_argnums=1)
compiled_smallest = jax.jit(keep_smallest, static_argnums=1)

# Few different values, so that there are ties; three shapes, since each one is compiled.
SCORES = st.sampled_from([2, 7, 12]).flatmap(
    lambda length: arrays.arrays(np.float32, (2, length), elements=st.sampled_from([0.0, 0.25, 0.5, 0.75]))
)


@given(scores=SCORES, data=st.data())
def test_the_smallest_stay_and_ties_go_to_the_lower_index(scores, data):
    length = scores.shape[1]
    keep = data.draw(st.sampled_from(sorted({1, length // 2, length - 1})))
    mask = compiled_smallest(jnp.asarray(scores), keep)
    for row, values in enumerate(scores):
        order = sorted(range(length), key=lambda i: (values[i], i))
        assert mask.ids_shuffle[row].tolist() == order
        assert mask.hidden[row].tolist() == [float(i not in order[:keep]) for i in range(length)]
        np.testing.assert_array_equal(mask.ids_shuffle[row][mask.ids_restore[row]], np.arange(length))


@pytest.mark.parametrize("keep", [0, 5, -1])
def test_a_mask_that_keeps_none_or_hides_none_is_refused(keep):
    with pytest.raises(ValueError, match=rf"keep {keep} is not in 1 \.\. 4"):
        keep_smallest(jnp.zeros((1, 5)), keep)


@pytest.mark.parametrize("kind", KINDS)
def test_every_mask_hides_as_many(kind):
    model = config(**KINDS[kind])
    mask = compiled_mask(noise(64, 48), model)
    np.testing.assert_array_equal(mask.hidden.sum(axis=1), np.full(64, 48 - model.keep))
    assert set(np.unique(mask.hidden)) == {0.0, 1.0}
    assert len(np.unique(mask.hidden, axis=0)) >= 4  # examples do not share a mask


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_depends_on_its_own_noise_alone(kind):
    model, rows = config(**KINDS[kind]), noise(5, 48)
    whole = compiled_mask(rows, model)
    for row in (0, 3):
        alone = compiled_mask(rows[row : row + 1], model)
        for together, one in zip(whole, alone, strict=True):
            np.testing.assert_array_equal(together[row], one[0])


def test_a_grid_mask_keeps_the_same_patch_of_every_cell():
    rows = noise(40, 48)
    kept = 1 - np.asarray(compiled_mask(rows, config(**KINDS["grid"])).hidden).reshape(40, 3, 2, 4, 2)
    offsets = kept.transpose(0, 1, 3, 2, 4).reshape(40, 12, 4)  # example, cell, place in the cell
    np.testing.assert_array_equal(offsets, np.broadcast_to(offsets[:, :1], offsets.shape))
    np.testing.assert_array_equal(offsets[:, 0].argmax(axis=1), rows[:, :4].argmin(axis=1))
    assert set(offsets[:, 0].argmax(axis=1)) == {0, 1, 2, 3}


def test_a_wider_grid_keeps_one_of_nine():
    scores = np.asarray(grid_scores(noise(3, 54), (6, 9), 3))
    assert (scores == 0).sum(axis=1).tolist() == [6, 6, 6]


def hidden_by_blocks(row, grid, count):
    """Rectangles painted one after another until `count` patches are hidden; then what is left, in order."""
    rows, columns = grid
    hidden = []
    for i in range(rows * columns // 4):
        area, aspect, top, left = (float(value) for value in row[4 * i : 4 * i + 4])
        area = (0.1 + 0.3 * area) * rows * columns
        aspect = 0.3 ** (1 - 2 * aspect)
        height = min(max(round(math.sqrt(area * aspect)), 1), rows)
        width = min(max(round(math.sqrt(area / aspect)), 1), columns)
        top, left = int(top * (rows - height + 1)), int(left * (columns - width + 1))
        hidden += [
            patch
            for patch in range(rows * columns)
            if top <= patch // columns < top + height and left <= patch % columns < left + width and patch not in hidden
        ]
    hidden += [patch for patch in range(rows * columns) if patch not in hidden]
    return set(hidden[:count])


@pytest.mark.parametrize(("image", "ratio"), [((24, 32), 0.3), ((56, 56), 0.75), ((12, 40), 0.5), ((40, 12), 0.5)])
def test_block_masks_hide_rectangles_one_after_another(image, ratio):
    model = config(image, masking="block", mask_ratio=ratio)
    rows = noise(50, model.num_patches)
    hidden = np.asarray(compiled_mask(rows, model).hidden)
    for row, found in zip(np.asarray(rows), hidden, strict=True):
        expected = hidden_by_blocks(row, model.grid, model.num_patches - model.keep)
        assert set(np.flatnonzero(found).tolist()) == expected


def test_blocks_hang_together():
    """A hidden patch's neighbour is hidden too, far more often than in a random mask of the same size."""

    def joined(kind):
        hidden = np.asarray(compiled_mask(noise(64, 196), config((56, 56), masking=kind, mask_ratio=0.5)).hidden)
        cells = hidden.reshape(64, 14, 14)
        return (cells[:, :, 1:] * cells[:, :, :-1]).sum() / cells[:, :, :-1].sum()

    assert joined("block") > 0.8
    assert 0.45 < joined("random") < 0.55


def test_block_scores_of_extreme_noise_stay_inside_the_image():
    for value in (0.0, np.nextafter(np.float32(1), np.float32(0))):
        scores = np.asarray(block_scores(jnp.full((1, 48), value, jnp.float32), (6, 8)))[0]
        assert sorted(scores) == sorted(set(scores))  # no two alike
        assert 4 <= (scores > -48).sum() <= 24  # the first rectangle: 10 to 40 % of 48 patches, rounded
