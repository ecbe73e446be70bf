"""The nearest of a bank that passes by in chunks, against the whole matrix of similarities."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_jax.evaluation.knn import SIZES, Neighbours, Sizes, nearest
from tests.refusals import refused


def corners(count, seed, width=16):
    """Corners of a cube: similarities are multiples of 1/8, exact in float32, and most of them equal to others."""
    return np.random.default_rng(seed).choice([-1, 1], (count, width)).astype(np.float32)


def by_matrix(bank, queries, k):
    """All similarities at once, in float64; of equal ones the first in the bank."""
    unit, asked = (
        x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
        for x in (bank, bank if queries is None else queries)
    )
    similarity = asked @ unit.T
    if queries is None:
        np.fill_diagonal(similarity, -np.inf)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, order, axis=1), order


def gathered(bank, queries, k, sizes=SIZES):
    groups = list(nearest(bank, queries, k, sizes))
    return Neighbours(*(np.concatenate(parts) for parts in zip(*groups, strict=True)))


@pytest.mark.parametrize("others", [True, False])
@pytest.mark.parametrize("k", [1, 40])
def test_equal_similarities_go_by_row(k, others):
    bank, queries = corners(300, 1), corners(50, 2) if others else None
    similarity, rows = by_matrix(bank, queries, k)
    assert k == 1 or (similarity[:, :-1] == similarity[:, 1:]).mean() > 0.5
    for sizes in (SIZES, Sizes(group=23, chunk=37, block=5)):
        found = gathered(bank, queries, k, sizes)
        np.testing.assert_array_equal(found.row, rows)
        np.testing.assert_array_equal(found.similarity, similarity)


@settings(max_examples=6)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.booleans())
def test_sizes_do_not_matter(group, chunk, block, others):
    bank, queries = corners(61, 3), corners(33, 4) if others else None
    expected = gathered(bank, queries, 19)
    found = gathered(bank, queries, 19, Sizes(group, chunk, block))
    np.testing.assert_array_equal(found.row, expected.row)
    np.testing.assert_array_equal(found.similarity, expected.similarity)


def test_features_of_any_length():
    random = np.random.default_rng(5)
    bank, queries = (random.normal(size=(n, 24)) * np.exp(random.normal(0, 3, (n, 1))) for n in (500, 40))
    bank, queries = bank.astype(np.float32), queries.astype(np.float32)
    similarity, rows = by_matrix(bank, queries, 30)
    for sizes in (SIZES, Sizes(chunk=64, block=16)):
        found = gathered(bank, queries, 30, sizes)
        np.testing.assert_array_equal(found.row, rows)
        np.testing.assert_allclose(found.similarity, similarity, rtol=0, atol=3e-7)


def test_zeros_are_equally_far_from_all():
    """Whatever the sign of the zero that a product gives."""
    bank = corners(12, 6)
    bank[4] = 0
    bank[7, :8], bank[7, 8:] = -1, 0
    found = gathered(bank, np.stack([np.zeros(16), -np.zeros(16)]).astype(np.float32), 12)
    np.testing.assert_array_equal(found.row, [np.arange(12)] * 2)
    np.testing.assert_array_equal(found.similarity, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("in_bank", [True, False])
def test_what_is_not_finite_is_refused(value, in_bank):
    bank, queries = corners(40, 7), corners(40, 8)
    (bank if in_bank else queries)[33, 2] = value
    with refused("features", "image 33"):
        gathered(bank, queries, 3, Sizes(chunk=10))
