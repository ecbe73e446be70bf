"""The random bits of both sides' generators, computed a second time: Threefry on the device, Philox on the host.

Threefry-2x32 with 20 rounds (Salmon et al. 2011, section 3.2) is written out here in NumPy, and so is what JAX makes of
its bits (`jax.random` with its default keys and `jax_threefry_partitionable`). A mistake of this project in a key, in a
stream's number or in the order of draws therefore shows, whereas a draw taken from mae_jax would be wrong alike.
"""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt, UInt32
from scipy import special

Key = UInt32[np.ndarray, "2"]

# The numbers by which streams of draws are kept apart, which a run's results depend on.
STREAMS = {
    "init": 0,
    "order": 1,
    "crop": 2,
    "flip": 3,
    "mask": 4,
    "samples": 5,
    "jitter": 6,
    "rand_augment": 7,
    "mix": 8,
    "erase": 9,
    "drop_path": 10,
    "head": 11,
    "target": 12,
}

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # of the odd and of the even groups of four rounds
_PARITY = 0x1BD11BDA  # of the key schedule, which makes no key all zeros
_WORD = 2**32


def threefry(key: Key, counters: UInt[np.ndarray, "*shape 2"]) -> UInt32[np.ndarray, "*shape 2"]:
    """Encrypt each pair of 32-bit words with the key, by 20 rounds of Threefry-2x32."""
    words = [int(word) for word in key]
    words.append(words[0] ^ words[1] ^ _PARITY)
    # 64 bits to a word, so that a sum modulo 2^32 is written as one.
    counters = counters.astype(np.uint64)
    left, right = (counters[..., 0] + words[0]) % _WORD, (counters[..., 1] + words[1]) % _WORD
    for group in range(1, 6):
        for distance in _ROTATIONS[(group - 1) % 2]:
            left = (left + right) % _WORD
            right = ((right << distance) % _WORD | right >> (32 - distance)) ^ left
        left = (left + words[group % 3]) % _WORD
        right = (right + words[(group + 1) % 3] + group) % _WORD
    return np.stack([left, right], axis=-1).astype(np.uint32)


def key_of(seed: int) -> Key:
    """Make the key of a seed below 2^64: its high and its low word."""
    return np.array(divmod(seed, _WORD), np.uint32)


def fold_in(key: Key, number: int) -> Key:
    """Derive the key of a number below 2^32: what the key makes of it."""
    return threefry(key, np.array([0, number], np.uint32))


def split(key: Key, count: int) -> list[Key]:
    """Derive several keys: what the key makes of 0, 1, 2 ..."""
    return list(_encrypted(key, (count,)))


def bits(key: Key, shape: Sequence[int], width: Literal[32, 64] = 32) -> UInt[np.ndarray, "..."]:
    """Draw words of random bits: both halves of an encrypted counter side by side, or for 32 bits their xor."""
    halves = _encrypted(key, shape)
    if width == 32:
        return halves[..., 0] ^ halves[..., 1]
    return halves[..., 0].astype(np.uint64) << 32 | halves[..., 1]


def _encrypted(key: Key, shape: Sequence[int]) -> UInt32[np.ndarray, "*shape 2"]:
    """Encrypt the number of each element, in row-major order, as a 64-bit counter."""
    numbers = np.arange(math.prod(shape), dtype=np.uint64).reshape(shape)
    return threefry(key, np.stack([numbers // _WORD, numbers % _WORD], axis=-1))


def uniform(key: Key, shape: Sequence[int] = (), dtype: str = "float32") -> Float[np.ndarray, "..."]:
    """Draw uniforms in [0, 1): the highest 23 bits of a word over 2^23, or in float64 52 over 2^52."""
    if dtype == "float32":
        return np.asarray((bits(key, shape, 32) >> 9) / 2**23, dtype)
    return np.asarray((bits(key, shape, 64) >> 12) / 2**52, dtype)


def normal(key: Key, shape: Sequence[int], dtype: str = "float32") -> Float[np.ndarray, "..."]:
    """Draw normals: sqrt(2) erfinv(u) of a u uniform in (-1, 1), by SciPy in float64, then rounded.

    XLA's inverse of erf is a polynomial, so that the last digits differ.
    """
    # -1, of which the normal is infinite, is left out: the range begins at the next number above.
    lowest = np.nextafter(np.array(-1, dtype), np.array(0, dtype))
    u = np.maximum(uniform(key, shape, dtype) * 2 + lowest, lowest)
    return (math.sqrt(2) * special.erfinv(u.astype(np.float64))).astype(dtype)


def beta(key: Key, alpha: float, dtype: str = "float32") -> float:
    """Draw a share from Beta(alpha, alpha) with a key that was computed here.

    JAX draws it: by rejection, with as many bits as it takes, which no closed form can be held against. What is left to
    this project are the key, alpha and the dtype; `tests/parity/test_draws.py` compares the distribution.
    """
    return float(jax.random.beta(jax.random.wrap_key_data(jnp.asarray(key)), alpha, alpha, dtype=dtype))


def device_key(seed: int, stream: str) -> Key:
    """Make the key of a stream on the device."""
    return fold_in(key_of(seed), STREAMS[stream])


def example_key(seed: int, stream: str, position: int) -> Key:
    """Make the key of one example of a stream on the device."""
    return fold_in(device_key(seed, stream), position)


def host_generator(seed: int, stream: str, position: int) -> np.random.Generator:
    """Make the generator of one example on the host: Philox-4x64, whose key and counter are one long number each.

    The seed is the low word of the key and the stream's number its high one; the position is the counter's highest of
    four words, so that every example has 2^192 counters of its own.
    """
    key = seed + (STREAMS[stream] << 64)
    return np.random.Generator(np.random.Philox(key=key, counter=position << 192))
