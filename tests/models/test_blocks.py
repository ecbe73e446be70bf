"""Each layer against the formula it stands for, written in NumPy with loops over heads."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.config import TransformerConfig, wide
from mae_jax.models.blocks import Block, Dense, LayerNorm, block_class, drop_path

STACK = TransformerConfig(width=12, depth=1, heads=3, mlp_ratio=2.0)


def values(*shape, seed=0, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def shaken(params, seed=1):
    """Parameters with noise on all of them, so that biases are not zero nor scales one."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [leaf + 0.3 * jnp.asarray(rng.normal(size=leaf.shape)) for leaf in leaves])


def naive_norm(x, params):
    deviation = np.sqrt(((x - x.mean(-1, keepdims=True)) ** 2).mean(-1, keepdims=True) + 1e-6)
    return (x - x.mean(-1, keepdims=True)) / deviation * params["scale"] + params["bias"]


def naive_softmax(scores):
    return np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)


def naive_attention(x, params, heads):
    fused = x @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    query, key, value = np.split(fused, 3, axis=-1)
    size = x.shape[-1] // heads
    mixed = np.zeros_like(x)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for example in range(len(x)):
            weights = naive_softmax(query[example, :, part] @ key[example, :, part].T / math.sqrt(size))
            mixed[example, :, part] = weights @ value[example, :, part]
    return mixed @ params["proj"]["kernel"] + params["proj"]["bias"]


def naive_mlp(x, params):
    hidden = x @ params["fc1"]["kernel"] + params["fc1"]["bias"]
    hidden = np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))))(hidden)
    return hidden @ params["fc2"]["kernel"] + params["fc2"]["bias"]


def naive_block(x, params, heads):
    x = x + naive_attention(naive_norm(x, params["norm1"]), params["attn"], heads)
    return x + naive_mlp(naive_norm(x, params["norm2"]), params["mlp"])


@pytest.mark.usefixtures("double")
def test_a_block_is_what_the_paper_says():
    block, x = Block(STACK, "float64"), values(2, 5, 12)
    params = shaken(jax.jit(block.init)(jax.random.key(0), x)["params"])
    expected = naive_block(np.asarray(x), jax.tree.map(np.asarray, params), STACK.heads)
    np.testing.assert_allclose(jax.jit(block.apply)({"params": params}, x), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-3, 0.0), (1.0, 300.0)])
def test_layer_norm_in_float32(scale, offset):
    """At a deviation of 1e-3 eps weighs as much as the variance; at a mean of 300 one pass would lose digits."""
    x = scale * values(3, 4, 64, dtype=np.float32) + offset
    params = {"scale": values(64, seed=1, dtype=np.float32), "bias": values(64, seed=2, dtype=np.float32)}
    found = LayerNorm("float32").apply({"params": params}, x)
    expected = naive_norm(np.asarray(x, np.float64), jax.tree.map(lambda p: np.asarray(p, np.float64), params))
    # The mean of numbers around 300 is known to 300 x 2^-24 only.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5 if offset == 0 else 3e-4)


@pytest.mark.parametrize(("dtype", "kept"), [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")])
@pytest.mark.usefixtures("double")
def test_what_stays_wide(dtype, kept):
    assert wide(dtype) == kept
    block, x = Block(STACK, dtype), values(1, 3, 12, dtype=kept)
    tokens, params = jax.eval_shape(block.init_with_output, jax.random.key(0), x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {kept}
    assert tokens.dtype == kept
    product, params = jax.eval_shape(Dense(4, dtype).init_with_output, jax.random.key(0), x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {kept}
    assert product.dtype == dtype


def test_recomputing_a_block_changes_nothing():
    x = values(2, 5, 12, dtype=np.float32)
    plain, recomputed = (block_class(remat)(STACK, "float32") for remat in (False, True))
    params = jax.jit(plain.init)(jax.random.key(0), x)["params"]

    def square(block):
        return jax.value_and_grad(lambda params: jnp.square(block.apply({"params": params}, x, 0)).sum())

    value, gradient = jax.jit(square(plain))(params)
    value_again, gradient_again = jax.jit(square(recomputed))(params)
    np.testing.assert_allclose(value_again, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient_again, gradient)
    assert "remat2" in str(jax.make_jaxpr(square(recomputed))(params))
    assert "remat2" not in str(jax.make_jaxpr(square(plain))(params))


@pytest.mark.parametrize("remat", [False, True])
def test_blocks_of_one_shape_are_traced_once(remat):
    blocks = [block_class(remat)(STACK, "float32") for _ in range(3)]
    x = values(2, 5, 12, dtype=np.float32)
    params = [block.init(jax.random.key(number), x, 0)["params"] for number, block in enumerate(blocks)]

    def stack(params):
        y = x
        for block, own in zip(blocks, params, strict=True):
            y = block.apply({"params": own}, y, 0)
        return y

    calls = [equation for equation in jax.make_jaxpr(stack)(params).eqns if "jaxpr" in equation.params]
    assert len(calls) == 3
    assert len({id(call.params["jaxpr"]) for call in calls}) == 1


@pytest.mark.usefixtures("double")
def test_a_block_with_dropped_branches():
    """Multiplied by 0 a branch is not there, by 2 it is there twice; also where it is recomputed."""
    x, survival = values(3, 5, 12), jnp.asarray([[0.0, 2.0], [2.0, 0.0], [1.0, 1.0]])
    block = Block(STACK, "float64")
    params = shaken(block.init(jax.random.key(0), x)["params"])
    found = block_class(True)(STACK, "float64").apply({"params": params}, x, 0, survival)
    for example, (first, second) in enumerate(survival.tolist()):
        row = np.asarray(x[example : example + 1])
        row = row + first * naive_attention(naive_norm(row, params["norm1"]), params["attn"], 3)
        row = row + second * naive_mlp(naive_norm(row, params["norm2"]), params["mlp"])
        np.testing.assert_allclose(found[example], row[0], rtol=1e-10, atol=1e-10)


def test_the_rate_rises_from_nothing_to_the_last_block():
    uniforms = jnp.asarray(np.random.default_rng(0).random((4000, 5, 2)), jnp.float32)
    factors = np.asarray(drop_path(uniforms, 0.4))
    dropped = (factors == 0).mean(axis=(0, 2))
    np.testing.assert_allclose(dropped, [0, 0.1, 0.2, 0.3, 0.4], atol=0.02)
    assert (factors[:, 0] == 1).all()
    np.testing.assert_allclose(np.unique(factors[:, 4]), [0, 1 / 0.6], rtol=1e-6)
