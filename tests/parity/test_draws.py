"""Random bits, computed from what is published about the generators, are those that JAX and NumPy give."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

torch = pytest.importorskip("torch")

from mae_jax import rng
from parity import bounds, draws
from parity.bounds import Pair

WORDS = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**31, 2**32 - 1])
SHAPES = st.sampled_from([(), (5,), (3, 4)])
DTYPES = st.sampled_from(["float32", "float64"])


@pytest.fixture(autouse=True)
def _wide():
    """Float64 is there where 64-bit values are enabled alone; float32 is the same with them."""
    with jax.enable_x64(True):
        yield


def wrapped(key: np.ndarray) -> jax.Array:
    return jax.random.wrap_key_data(jax.numpy.asarray(key))


def words(key: jax.Array) -> list[int]:
    return np.asarray(jax.random.key_data(key)).ravel().tolist()


# The authors' own vectors (Random123, threefry2x32 of 20 rounds): counter, key, what comes out.
VECTORS = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_threefry_is_the_published_function(counter, key, expected):
    assert draws.threefry(np.array(key, np.uint32), np.array(counter, np.uint32)).tolist() == list(expected)


@given(WORDS, WORDS, WORDS)
def test_keys_are_derived_as_jax_derives_them(seed, number, position):
    key, ours = jax.random.key(seed), draws.key_of(seed)
    assert words(key) == ours.tolist()
    key, ours = jax.random.fold_in(key, np.uint32(number)), draws.fold_in(ours, number)
    assert words(key) == ours.tolist()
    assert words(jax.random.split(key, 3)) == np.stack(draws.split(ours, 3)).ravel().tolist()
    key = jax.random.fold_in(rng.device_key(seed, "erase"), np.uint32(position))
    assert words(key) == draws.example_key(seed, "erase", position).tolist()


@given(WORDS, WORDS, SHAPES, DTYPES)
def test_bits_and_uniforms_are_equal(high, low, shape, dtype):
    key = np.array([high, low], np.uint32)
    assert np.array_equal(jax.random.bits(wrapped(key), shape, "uint32"), draws.bits(key, shape))
    assert np.array_equal(jax.random.bits(wrapped(key), shape, "uint64"), draws.bits(key, shape, 64))
    drawn = draws.uniform(key, shape, dtype)
    expected = jax.random.uniform(wrapped(key), shape, dtype)
    assert (drawn.dtype, drawn.shape) == (expected.dtype, expected.shape)
    assert np.array_equal(drawn, expected)


@given(WORDS, WORDS, st.sampled_from(["float32", "float64"]))
def test_normals_agree(high, low, dtype):
    key = np.array([high, low], np.uint32)
    pair = Pair(
        "draws", "normal", jax.random.normal(wrapped(key), (2000,), dtype), draws.normal(key, (2000,), dtype), "normal"
    )
    assert bounds.compare(pair, dtype).passed


def test_normals_are_normal():
    drawn = draws.normal(draws.key_of(0), (2000,))
    assert stats.kstest(drawn, stats.norm.cdf).pvalue > 0.05
    assert stats.kstest(drawn, stats.norm(scale=1.2).cdf).pvalue < 0.01


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_shares_follow_beta_of_their_alpha(alpha, dtype):
    drawn = [draws.beta(key, alpha, dtype) for key in draws.split(draws.key_of(1), 2000)]
    assert stats.kstest(drawn, stats.beta(alpha, alpha).cdf).pvalue > 0.05
    for wrong in (0.6, 0.8, 1.0, 1.3):
        if wrong != alpha:
            assert stats.kstest(drawn, stats.beta(wrong, wrong).cdf).pvalue < 0.01


def test_streams_have_their_numbers():
    assert draws.STREAMS == rng.STREAMS


@given(WORDS, st.sampled_from(sorted(draws.STREAMS)), WORDS)
def test_host_generators_give_the_same_draws(seed, stream, position):
    ours, theirs = rng.host_generator(seed, stream, position), draws.host_generator(seed, stream, position)
    assert ours.integers(2**63, size=6).tolist() == theirs.integers(2**63, size=6).tolist()
    state = theirs.bit_generator.state["state"]
    assert state["key"].tolist() == [seed, draws.STREAMS[stream]]


@given(WORDS, st.lists(WORDS, min_size=2, max_size=2, unique=True))
def test_examples_have_bits_of_their_own(seed, positions):
    first, second = (draws.bits(draws.example_key(seed, "mask", position), (4,)).tolist() for position in positions)
    assert first != second
