"""Named random streams, on the host and on the device.

Keys are derived, never carried: root seed, then the stream's name, then the position of the example
in the stream of all examples. An example therefore gets the same crop, flip and mask noise on any
number of devices, workers and hosts, and after any restart.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import jax

# The numbers are part of a run's identity: never change or reuse one.
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

# Positions are 32-bit on the device; 1,600 epochs of ImageNet are 2.05e9 examples.
MAX_POSITION = 2**32 - 1


def host_generator(seed: int, stream: str, position: int) -> np.random.Generator:
    """Make the NumPy generator of one example: counter-based, so that any position costs the same."""
    return np.random.Generator(np.random.Philox(key=[seed, STREAMS[stream]], counter=[0, 0, 0, position]))


def device_key(seed: int, stream: str) -> "jax.Array":
    """Make the JAX key of a stream."""
    import jax

    return jax.random.fold_in(jax.random.key(seed), STREAMS[stream])


def example_uniforms(key: "jax.Array", positions: "jax.Array | np.ndarray", count: int) -> "jax.Array":
    """Draw `count` uniforms in [0, 1) for each position: (batch,) uint32 to (batch, count) float32.

    A row depends on `key` and its own position alone, not on the rest of the batch.
    """
    import jax
    import jax.numpy as jnp

    def row(position: "jax.Array") -> "jax.Array":
        return jax.random.uniform(jax.random.fold_in(key, position), (count,), dtype="float32")

    return jax.vmap(row)(jnp.asarray(positions))
