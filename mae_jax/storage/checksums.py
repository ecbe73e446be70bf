"""A fingerprint of arrays: Orbax notices a missing or short file, but reads flipped bits as numbers."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding


@jax.jit
def _sum(leaf: jax.Array) -> jax.Array:
    """Compiled within what is compiled: arrays of one shape, of which a model has many, are traced once."""
    words = jax.lax.bitcast_convert_type(leaf, jnp.uint16 if leaf.dtype.itemsize == 2 else jnp.uint32)
    # Not raveled: each device sums up the part that it has, with the places that this has in the whole.
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words.astype(jnp.uint32) * (2 * place + jnp.uint32(1)), dtype=jnp.uint32)


def _fingerprints(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_sum(leaf) for leaf in leaves])


@functools.cache
def _summing(sharding: Sharding) -> Callable[[list[jax.Array]], jax.Array]:
    return jax.jit(_fingerprints, out_shardings=sharding)


def fingerprint(tree: Any) -> dict[str, int]:
    """A 32-bit sum of each array's bits, weighted by place: a change of any one 32-bit word changes it.

    The same for every layout. Where arrays lie on several hosts, all of them must call this.
    """
    paths, leaves = zip(*jax.tree_util.tree_flatten_with_path(tree)[0], strict=True)
    sharding = leaves[0].sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    sums = np.asarray(_summing(sharding)(list(leaves)))
    return {jax.tree_util.keystr(path): int(value) for path, value in zip(paths, sums, strict=True)}


def check_fingerprint(tree: Any, recorded: dict[str, int]) -> None:
    """Compare arrays with the fingerprint of what was written.

    Raises:
      ValueError: they differ.
    """
    wrong = [key for key, value in fingerprint(tree).items() if recorded.get(key) != value]
    if wrong:
        raise ValueError(f"{len(wrong)} arrays are not what was written, {wrong[0]} among them")
