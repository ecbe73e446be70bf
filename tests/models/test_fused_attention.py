"""cuDNN's attention: on every machine what it is asked for, on a GPU what it answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.config import TransformerConfig
from mae_jax.models.blocks import Block, fused_attend

CASES = [(6, 0), (7, 0), (7, 2), (7, 3), (6, 3)]  # tokens, of which the first so many have no query


def fused(tokens, head_dim):
    return jnp.asarray(np.random.default_rng(tokens).normal(size=(3, tokens, 3, 2, head_dim)), jnp.bfloat16)


def plain(fused, since):
    query, key, value = fused.transpose(2, 0, 3, 1, 4)
    weights = jax.nn.softmax(query[:, :, since:] @ key.mT * key.shape[-1] ** -0.5)
    return (weights @ value).transpose(0, 2, 1, 3)


def result_and_gradient(attend, inputs, since):
    result, transpose = jax.vjp(lambda inputs: attend(inputs, since), inputs)
    return result, *transpose(jnp.cos(jnp.arange(result.size)).reshape(result.shape).astype(result.dtype))


def check(tokens, since, head_dim=8):
    """Against the plain formula in float32: off by bfloat16's rounding alone."""
    inputs = fused(tokens, head_dim)
    found = result_and_gradient(fused_attend, inputs, since)
    expected = result_and_gradient(plain, inputs.astype(jnp.float32), since)
    for low, leaf in zip(found, expected, strict=True):
        assert low.dtype == jnp.bfloat16
        assert low.shape == leaf.shape
        assert np.abs(np.asarray(low, np.float32) - leaf).max() / np.abs(leaf).max() < 2e-2


@pytest.fixture(autouse=True)
def _mixed_types():
    """JAX's own code relies on them."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def stand_in(monkeypatch):
    """JAX's own formula behind the same signature; what it was given."""
    given, attention = [], jax.nn.dot_product_attention

    def answer(query, key, value, *, key_value_seq_lengths, implementation):
        assert implementation == "cudnn"
        given.append((query.shape[1], key.shape[1], value.shape[1]))
        return attention(query, key, value, key_value_seq_lengths=key_value_seq_lengths, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    return given


@pytest.mark.parametrize(("tokens", "since"), CASES)
def test_odd_lengths_are_made_even_and_change_nothing(stand_in, tokens, since):
    check(tokens, since)
    assert all(length % 2 == 0 for length in stand_in[0])


def test_a_block_has_the_same_parameters_with_it(stand_in):
    stack, x = TransformerConfig(16, 1, 2), jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 16)), jnp.float32)
    ours, theirs = Block(stack, "bfloat16"), Block(stack, "bfloat16", "cudnn")
    params = ours.init(jax.random.key(0), x)
    found, expected = (jax.jit(lambda x, b=block: b.apply(params, x, 3))(x) for block in (theirs, ours))
    assert len(stand_in) == 1
    np.testing.assert_allclose(found, expected, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("tokens", "since"), CASES)
@pytest.mark.parametrize("head_dim", [8, 32, 64, 80])
def test_on_a_gpu(tokens, since, head_dim):
    check(tokens, since, head_dim)
    check(196 + tokens % 2, since, head_dim)
