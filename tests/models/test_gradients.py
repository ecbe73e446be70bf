"""Each operation and its written gradient against the plain formula, as JAX differentiates it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.gradients import affine, attend, gelu, split_heads


def values(*shape, seed=0, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def plain_affine(x, kernel, bias):
    return jnp.einsum("btx,xy->bty", x, kernel) + bias


def plain_split(fused):
    return tuple(fused[:, :, which].transpose(0, 2, 1, 3) for which in range(3))


def plain_attention(query, key, value):
    return jax.nn.softmax(query @ key.mT * query.shape[-1] ** -0.5) @ value


def plain_gelu(x):
    return jax.nn.gelu(x, approximate=False)


OPERATIONS = {
    "affine": (lambda x, *params: affine(x, *params, x.dtype.name), plain_affine, [(2, 5, 4), (4, 3), (3,)]),
    "split_heads": (split_heads, plain_split, [(2, 5, 3, 2, 4)]),
    "attend": (
        lambda *heads: attend(*heads, heads[0].dtype.name),
        plain_attention,
        [(2, 3, 2, 4), *[(2, 3, 5, 4)] * 2],
    ),
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
    """Activations and their gradients are bfloat16; against float32 each is off by a few steps of 2^-8."""
    ours, plain, shapes = OPERATIONS[name]
    low = [values(*shape, seed=seed, dtype=jnp.bfloat16) for seed, shape in enumerate(shapes)]
    if name == "affine":
        low[1:] = [parameter.astype(jnp.float32) for parameter in low[1:]]
    found = result_and_gradients(ours, low)
    expected = result_and_gradients(plain, [x.astype(jnp.float32) for x in low])
    assert {leaf.dtype.name for leaf in found[: -len(low)]} == {"bfloat16"}
    assert [leaf.dtype for leaf in found[-len(low) :]] == [leaf.dtype for leaf in low]
    for low_leaf, leaf in zip(found, expected, strict=True):
        error = np.abs(np.asarray(low_leaf, np.float32) - leaf).max() / np.abs(leaf).max()
        assert error < 2e-2


def test_gradients_of_parameters_are_not_rounded_to_bfloat16():
    """Of factors that bfloat16 holds exactly, sums in float32 are the exact ones."""
    rng = np.random.default_rng(0)
    x, gradient = (jnp.asarray(rng.integers(-8, 9, (2, 400, width)), jnp.bfloat16) for width in (4, 3))
    kernel, bias = jnp.ones((4, 3)), jnp.zeros(3)
    _, transpose = jax.vjp(lambda kernel, bias: affine(x, kernel, bias, "bfloat16"), kernel, bias)
    to_kernel, to_bias = transpose(gradient)
    assert to_kernel.dtype == to_bias.dtype == jnp.float32
    rows, columns = (np.asarray(a, np.float32).reshape(800, -1) for a in (x, gradient))
    np.testing.assert_array_equal(to_kernel, rows.T @ columns)
    np.testing.assert_array_equal(to_bias, columns.sum(axis=0))


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
