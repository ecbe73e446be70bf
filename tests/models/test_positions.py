"""Position tables, against numbers worked out by hand and loops written from the paper's formulas."""

import math

import numpy as np
import pytest

from mae_jax.models.patches import fixed_positions, resize_positions, sincos1d, sincos2d

sin, cos = math.sin, math.cos


def test_two_dimensions_by_hand():
    """Width 8 has two frequencies, 1 and 10000^-1/2 = 0.01; a row of the table is column half, then row half."""
    table = sincos2d(8, (2, 3))
    assert table.shape == (6, 8)
    np.testing.assert_array_equal(table[0], [0, 0, 1, 1, 0, 0, 1, 1])
    column_two_row_one = [sin(2), sin(0.02), cos(2), cos(0.02), sin(1), sin(0.01), cos(1), cos(0.01)]
    np.testing.assert_allclose(table[5], column_two_row_one, rtol=1e-15, atol=0)


def test_the_column_comes_first():
    table = sincos2d(16, (3, 5)).reshape(3, 5, 16)
    np.testing.assert_array_equal(table[:, :, :8], np.broadcast_to(table[:1, :, :8], (3, 5, 8)))
    np.testing.assert_array_equal(table[:, :, 8:], np.broadcast_to(table[:, :1, 8:], (3, 5, 8)))
    assert (table[0, 0, :8] != table[0, 1, :8]).any()
    assert (table[0, 0, 8:] != table[1, 0, 8:]).any()


def test_two_dimensions_by_loops():
    width, grid = 20, (3, 4)
    table = sincos2d(width, grid)
    for index in range(12):
        expected = []
        for coordinate in (index % grid[1], index // grid[1]):
            angles = [coordinate * 10000 ** (-k / (width / 4)) for k in range(width // 4)]
            expected += [sin(a) for a in angles] + [cos(a) for a in angles]
        np.testing.assert_allclose(table[index], expected, rtol=1e-14, atol=1e-15)


def test_one_dimension_by_hand():
    """Width 4: frequencies 1 and 0.01, sin and cos in turn."""
    table = sincos1d(4, 6)
    np.testing.assert_array_equal(table[0], [0, 1, 0, 1])
    np.testing.assert_allclose(table[5], [sin(5), cos(5), sin(0.05), cos(0.05)], rtol=1e-15, atol=0)


@pytest.mark.parametrize("kind", ["sincos2d", "sincos1d"])
def test_the_class_token_has_a_row_of_zeros_in_front(kind):
    with_row, without = (fixed_positions(kind, 8, (2, 3), class_token) for class_token in (True, False))
    assert (with_row.shape, without.shape) == ((7, 8), (6, 8))
    np.testing.assert_array_equal(with_row[0], np.zeros(8))
    np.testing.assert_array_equal(with_row[1:], without)


@pytest.mark.parametrize("kind", ["sincos2d", "sincos1d"])
def test_tables_are_computed_in_float64_and_kept_in_float32(kind):
    table = fixed_positions(kind, 64, (14, 14), False)
    exact = sincos2d(64, (14, 14)) if kind == "sincos2d" else sincos1d(64, 196)
    assert (exact.dtype, table.dtype) == (np.float64, np.float32)
    np.testing.assert_array_equal(table, exact.astype(np.float32))
    assert len(np.unique(table, axis=0)) == 196  # no two places look alike


def test_one_row_of_patches_is_the_first_row_of_any_grid():
    np.testing.assert_array_equal(sincos2d(16, (4, 5))[:5], sincos2d(16, (1, 5)))


def test_widths_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="width 10 is not divisible by 4"):
        sincos2d(10, (2, 2))
    with pytest.raises(ValueError, match="width 9 is not divisible by 2"):
        sincos1d(9, 4)
    with pytest.raises(ValueError, match="'learned' are not frozen"):
        fixed_positions("learned", 8, (2, 2), True)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize(("old", "new"), [((4, 4), (6, 6)), ((14, 14), (28, 28)), ((6, 5), (3, 7)), ((3, 1), (1, 2))])
def test_a_resized_table_is_pytorchs(old, new, class_token):
    """Bicubic without antialiasing, as the authors' fine-tuning resizes; the class token's row stays."""
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).standard_normal((old[0] * old[1] + class_token, 8))
    found = resize_positions(table, old, new, class_token)
    grid = torch.from_numpy(table[int(class_token) :].reshape(1, *old, 8)).movedim(-1, 1)
    expected = torch.nn.functional.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    np.testing.assert_allclose(found[int(class_token) :], expected[0].flatten(1).T, atol=1e-12)
    np.testing.assert_array_equal(found[: int(class_token)], table[: int(class_token)])


def test_the_same_grid_is_left_as_it_is():
    table = np.random.default_rng(0).standard_normal((17, 8)).astype(np.float32)
    np.testing.assert_array_equal(resize_positions(table, (4, 4), (4, 4), True), table)
