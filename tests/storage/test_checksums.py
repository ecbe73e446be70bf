"""Arrays and files that are not what was written are known from those that are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mae_jax.storage.checksums import HASHED, SUMMED, altered, file_checksums, fingerprint

VALUES = np.random.default_rng(0).normal(size=(24, 8)).astype(np.float32)


def hashed(values):
    """The hash of one array."""
    (value,) = fingerprint({"a": jnp.asarray(values)}).values()
    return value


def test_a_fingerprint_sees_every_single_bit():
    values = VALUES[:3, :5]
    for version in (SUMMED, HASHED):
        before = fingerprint({"a": jnp.asarray(values)}, version)
        for index in range(15):
            for bit in (0, 13, 31):
                bits = values.copy().view(np.uint32)
                bits.flat[index] ^= np.uint32(1 << bit)
                assert fingerprint({"a": jnp.asarray(bits.view(np.float32))}, version) != before
        assert fingerprint({"a": jnp.asarray(values)}, version) == before


def swapped_signs(values, first, second):
    """Two values of different signs with each other's: a sum of words, weighted or not, sees little of it."""
    values = np.abs(values)
    values.flat[first] *= -1
    other = values.copy()
    other.flat[first] *= -1
    other.flat[second] *= -1
    return values, other


places = st.integers(0, VALUES.size - 1)
CHANGES = {
    "negated": lambda x, i, j: (x, -x),
    "negated zeros": lambda x, i, j: (0 * x, -0.0 * np.abs(x)),
    "swapped signs": swapped_signs,
    "swapped values": lambda x, i, j: (x, exchanged(x, i, j)),
    "tail of zeros": lambda x, i, j: (x, np.where(np.arange(x.size).reshape(x.shape) < max(i, j), x, 0)),
    "rows in another order": lambda x, i, j: (x, np.roll(x, 1 + i % 23, axis=0)),
    "rows backwards": lambda x, i, j: (x, x[::-1]),
    "columns in another order": lambda x, i, j: (x, np.roll(x, 1 + i % 7, axis=1)),
    "shifted": lambda x, i, j: (x, np.roll(x.ravel(), 1 + i % 190).reshape(x.shape)),
    "twice as large": lambda x, i, j: (x, 2 * x),
    "one value more and one less": lambda x, i, j: (x, nudged(x, i, j)),
}


def exchanged(values, first, second):
    other = values.copy()
    other.flat[first], other.flat[second] = values.flat[second], values.flat[first]
    return other


def nudged(values, first, second):
    bits = values.copy().view(np.uint32)
    bits.flat[first] += np.uint32(1)
    bits.flat[second] -= np.uint32(1)
    return bits.view(np.float32)


@pytest.mark.parametrize("name", CHANGES)
@given(seed=st.integers(0, 2**32 - 1), first=places, second=places)
def test_a_hash_sees_what_sums_do_not(name, seed, first, second):
    if first == second:
        second = (first + 1) % VALUES.size
    drawn = np.random.default_rng(seed).normal(size=VALUES.shape).astype(np.float32)
    one, other = CHANGES[name](drawn, first, second)
    assert one.tobytes() != other.tobytes()
    assert hashed(one.astype(np.float32)) != hashed(other.astype(np.float32))


def test_both_halves_of_a_hash_spread():
    """Of 4,096 arrays that differ in one word, the hashes and each half of them are all different but for chance."""
    hashes = np.array([hashed(np.array([word, 7, 0], np.int32)) for word in range(4096)], np.uint64)
    assert len(np.unique(hashes)) == 4096
    for half in (hashes >> np.uint64(32), hashes & np.uint64(2**32 - 1)):
        assert len(np.unique(half)) >= 4090
        ones = np.unpackbits(half.astype(np.uint32).view(np.uint8)).reshape(4096, 32).mean(axis=0)
        np.testing.assert_allclose(ones, 0.5, atol=0.1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8])
def test_the_same_for_every_layout(dtype):
    whole = jnp.asarray(VALUES, dtype)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    for version in (SUMMED, HASHED):
        wanted = fingerprint({"a": whole}, version)
        for spec in [(), ("a",), ("b",), (("a", "b"),), ("a", "b"), (None, "b"), (None, ("a", "b"))]:
            cut = jax.device_put(whole, NamedSharding(mesh, PartitionSpec(*spec)))
            assert fingerprint({"a": cut}, version) == wanted, spec
            assert altered({"a": cut}, wanted, version) is None


def test_hashes_stay_what_they_are():
    """Those of old checkpoints are compared with today's."""
    values = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    assert fingerprint({"a": values, "b": -values[0]}, SUMMED) == {"['a']": SUM_A, "['b']": SUM_B}
    assert fingerprint({"a": values, "b": -values[0]}, HASHED) == {"['a']": HASH_A, "['b']": HASH_B}
    words = altered({"a": values, "b": values[0]}, {"['a']": HASH_A, "['b']": HASH_B}, HASHED)
    assert words == "1 arrays are not what was written, ['b'] among them"


SUM_A, SUM_B = 3416260608, 2122317824
HASH_A, HASH_B = 4757603949097761923, 1588241449503400841


def test_files_by_their_names_size_and_contents(tmp_path):
    (tmp_path / "inner" / "most").mkdir(parents=True)
    (tmp_path / "a").write_bytes(b"123456789")
    (tmp_path / "inner" / "most" / "b").write_bytes(bytes(3 * 2**20))
    assert file_checksums(tmp_path)["a"] == [9, 0xCBF43926]  # CRC-32's check value
    found = file_checksums(tmp_path, "inner")
    assert {name: size for name, (size, _) in found.items()} == {"inner/most/b": 3 * 2**20}
    with pytest.raises(FileNotFoundError):
        file_checksums(tmp_path, "nowhere")
