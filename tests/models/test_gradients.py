"""Each operation and its written gradient against the plain formula, as JAX differentiates it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.gradients import attend, gelu, product, split_heads


def values(*shape, seed=0, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def plain_product(x, kernel):
    return jnp.einsum("btx,xy->bty", x, kernel)


def plain_split(fused):
    return tuple(fused[:, :, which].transpose(0, 2, 1, 3) for which in range(3))


def plain_attention(query, key, value):
    return jax.nn.softmax(query @ key.mT * query.shape[-1] ** -0.5) @ value


def plain_gelu(x):
    return jax.nn.gelu(x, approximate=False)


OPERATIONS = {
    "product": (product, plain_product, [(2, 5, 4), (4, 3)]),
    "split_heads": (split_heads, plain_split, [(2, 5, 3, 2, 4)]),
    "attend": (lambda *heads: attend(*heads, heads[0].dtype.name), plain_attention, [(2, 3, 5, 4)] * 3),
    "gelu": (gelu, plain_gelu, [(50,)]),
}


def result_and_gradients(function, inputs):
    """Its results, and the gradients of a sum of them with weights that are all different."""
    results, transpose = jax.vjp(function, *inputs)
    weights = jax.tree.map(lambda leaf: values(*leaf.shape, seed=9, dtype=leaf.dtype), results)
    return jax.tree.leaves((results, transpose(weights)))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", OPERATIONS)
def test_value_and_gradients(name):
    ours, plain, shapes = OPERATIONS[name]
    inputs = [3 * values(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    both = (result_and_gradients(jax.jit(function), inputs) for function in (ours, plain))
    for found, expected in zip(*both, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", OPERATIONS)
def test_bfloat16_is_off_by_its_own_rounding(name):
    """Gradients come in the dtype of what they belong to; against float32 each is off by a few steps of 2^-8."""
    ours, plain, shapes = OPERATIONS[name]
    low = [values(*shape, seed=seed, dtype=jnp.bfloat16) for seed, shape in enumerate(shapes)]
    found = result_and_gradients(ours, low)
    expected = result_and_gradients(plain, [x.astype(jnp.float32) for x in low])
    assert {leaf.dtype.name for leaf in found} == {"bfloat16"}
    for low_leaf, leaf in zip(found, expected, strict=True):
        error = np.abs(np.asarray(low_leaf, np.float32) - leaf).max() / np.abs(leaf).max()
        assert error < 2e-2


def test_large_scores_do_not_overflow():
    query = key = jnp.full((1, 1, 2, 4), 30.0)  # exp(1800) is beyond any float
    value = values(1, 1, 2, 4, dtype=np.float32)
    mixed, *gradients = result_and_gradients(lambda *heads: attend(*heads, "float32"), [query, key, value])
    np.testing.assert_allclose(mixed[0, 0], np.broadcast_to(value[0, 0].mean(axis=0), (2, 4)), rtol=1e-6, atol=1e-7)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.usefixtures("double")
def test_gelu_is_exact():
    points = [-6.0, -2.5, -1.0, -0.1, 0.0, 0.3, 1.0, 3.0, 8.0]
    expected = [0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in points]
    np.testing.assert_allclose(gelu(jnp.asarray(points)), expected, rtol=1e-13, atol=1e-15)
    # The tanh approximation is off by up to 5e-4; here it would show.
    assert abs(float(jax.nn.gelu(jnp.asarray(2.5), approximate=True)) - float(gelu(jnp.asarray(2.5)))) > 1e-5
