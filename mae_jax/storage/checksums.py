"""Checksums of a checkpoint, of two kinds: of its files as they lie on the disk, and of its arrays on the device.

Those of files are compared before anything is read, so that damage is known from other failures to read. Those of
arrays are the same for every layout over devices, and see what happens between device and disk.
"""

import functools
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

SUMMED, HASHED = 1, 2  # versions of the fingerprint: that of mae_jax 0.1.0, and today's
_CHUNK = 2**20  # bytes


def _words_and_places(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Give the bits of an array as uint32, and the place of each in the whole; each device does so for its part."""
    words = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32))
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return words.astype(jnp.uint32), place


@jax.jit
def _sum(leaf: jax.Array) -> jax.Array:
    """Sum up words weighted by place: it misses a negated array of an even number of values."""
    words, place = _words_and_places(leaf)
    return jnp.stack([jnp.uint32(0), jnp.sum(words * (2 * place + jnp.uint32(1)), dtype=jnp.uint32)])


@jax.jit
def _hash(leaf: jax.Array) -> jax.Array:
    """Sum up words mixed with their places, twice: what one sum misses the other sees (as MurmurHash3's finalizer)."""
    words, place = _words_and_places(leaf)
    mixed = (words ^ (place * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    low = mixed ^ (mixed >> 16)
    high = (low ^ (place >> 3)) * jnp.uint32(0x27D4EB2F)
    high = high ^ (high >> 15)
    return jnp.stack([jnp.sum(high, dtype=jnp.uint32), jnp.sum(low, dtype=jnp.uint32)])


@functools.cache
def _compiled(version: int, sharding: Sharding) -> Callable[[list[jax.Array]], jax.Array]:
    # Arrays of one shape, of which a model has many, are traced once: what is called in a loop is compiled itself.
    one = _sum if version == SUMMED else _hash
    return jax.jit(lambda leaves: jnp.stack([one(leaf) for leaf in leaves]), out_shardings=sharding)


def fingerprint(tree: Any, version: int = HASHED) -> dict[str, int]:
    """Hash the bits of each array to 64 bits, with the place of each word: a change by chance passes once in 2^64.

    The same for every layout. Where arrays lie on several hosts, all of them must call this.
    """
    paths, leaves = zip(*jax.tree_util.tree_flatten_with_path(tree)[0], strict=True)
    sharding = leaves[0].sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    halves = np.asarray(_compiled(version, sharding)(list(leaves))).astype(np.uint64)
    values = (halves[:, 0] << np.uint64(32) | halves[:, 1]).tolist()
    return {jax.tree_util.keystr(path): value for path, value in zip(paths, values, strict=True)}


def altered(tree: Any, recorded: dict[str, int], version: int) -> str | None:
    """Compare arrays with the fingerprint of what was written: what differs, or None where nothing does."""
    wrong = [key for key, value in fingerprint(tree, version).items() if recorded.get(key) != value]
    return f"{len(wrong)} arrays are not what was written, {wrong[0]} among them" if wrong else None


def file_checksums(folder: Path, inner: str = ".") -> dict[str, list[int]]:
    """Compute size and CRC-32 of each file below `folder / inner`, by its name in `folder`.

    Raises:
      OSError: one cannot be read.
    """
    walk = os.walk(folder / inner, onerror=_raise)
    files = sorted(Path(parent, name) for parent, _, names in walk for name in names)
    with ThreadPoolExecutor(4) as pool:
        return {
            str(file.relative_to(folder)): found for file, found in zip(files, pool.map(_crc32, files), strict=True)
        }


def _raise(error: OSError) -> None:
    raise error


def _crc32(file: Path) -> list[int]:
    size = crc = 0
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]
