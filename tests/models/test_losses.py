"""The target and the loss, against the definition in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.mae import normalise_patches, patch_errors, patch_statistics


def patches(*shape, seed=0):
    return np.random.default_rng(seed).normal(2.0, 3.0, shape)


@pytest.mark.usefixtures("double")
def test_normalised_patches_use_the_unbiased_variance():
    x = patches(2, 3, 12)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(normalise_patches(jnp.asarray(x)), expected, rtol=1e-13)
    # Two values have a variance twice that of the biased estimate: by hand, -1 / sqrt(2) and 1 / sqrt(2).
    pair = normalise_patches(jnp.asarray([[[1.0, 3.0]]]))[0, 0]
    np.testing.assert_allclose(pair, [-((2 + 1e-6) ** -0.5), (2 + 1e-6) ** -0.5], rtol=1e-15)


def test_a_patch_of_one_colour_stays_finite():
    centre, deviation = patch_statistics(jnp.full((1, 1, 12), 0.25))
    assert (float(centre[0, 0, 0]), float(deviation[0, 0, 0])) == (0.25, pytest.approx(1e-3, rel=1e-6))
    np.testing.assert_array_equal(normalise_patches(jnp.full((1, 1, 12), 0.25)), np.zeros((1, 1, 12)))


@pytest.mark.usefixtures("double")
def test_the_statistics_undo_the_normalisation():
    x = jnp.asarray(patches(2, 3, 12))
    centre, deviation = patch_statistics(x)
    np.testing.assert_allclose(normalise_patches(x) * deviation + centre, x, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("double")
def test_errors_are_averaged_inside_each_patch():
    pred, target = patches(2, 3, 5), patches(2, 3, 5, seed=1)
    np.testing.assert_allclose(
        patch_errors(jnp.asarray(pred), jnp.asarray(target)), ((pred - target) ** 2).mean(-1), rtol=1e-14
    )
