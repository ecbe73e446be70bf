"""Arrays that are not what was written are told from those that are."""

import jax.numpy as jnp
import numpy as np

from mae_jax.storage.checksums import fingerprint


def test_a_fingerprint_sees_every_single_bit():
    values = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    before = fingerprint({"a": jnp.asarray(values)})
    for index in range(15):
        for bit in (0, 13, 31):
            bits = values.copy().view(np.uint32)
            bits.flat[index] ^= np.uint32(1 << bit)
            assert fingerprint({"a": jnp.asarray(bits.view(np.float32))}) != before
    swapped = values.copy()
    swapped[0, 0], swapped[0, 1] = values[0, 1], values[0, 0]
    assert fingerprint({"a": jnp.asarray(swapped)}) != before
    assert fingerprint({"a": jnp.asarray(values)}) == before
