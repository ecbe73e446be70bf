"""Checkpoints whose contents are known, and ways to damage them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np

STEPS = (2, 4, 6)


def state_at(state, step):
    """A state of a run's length whose every number is another one, also in EMA and in the optimizer."""
    rng = np.random.default_rng(step)

    def draw(leaf):
        values = rng.normal(size=leaf.shape) if leaf.dtype.kind == "f" else np.full(leaf.shape, step)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree.map(draw, state)


def assert_same_bits(found, expected):
    paths = jax.tree.leaves_with_path(expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, wanted), leaf in zip(paths, jax.tree.leaves(found), strict=True):
        assert (leaf.dtype, leaf.shape) == (wanted.dtype, wanted.shape), path
        assert np.asarray(leaf).tobytes() == np.asarray(wanted).tobytes(), path


def largest_file(folder):
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def cut(folder):
    file = largest_file(folder / "state")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def delete(folder):
    """All files of data, whatever they are called; which of them holds which array is Orbax's affair."""
    for file in (folder / "state").rglob("d/*"):
        file.unlink()


def flip(folder):
    file = largest_file(folder / "state")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0b100
    file.write_bytes(data)


def delete_record(folder):
    shutil.rmtree(folder / "record")


def _record(folder, **values):
    file = folder / "record" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def number_for_config(folder):
    _record(folder, config=5)


def number_for_fingerprint(folder):
    _record(folder, fingerprint=3)


def empty(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def another_state(folder):
    """All is well formed, but these are the numbers of another step."""
    shutil.rmtree(folder / "state")
    shutil.copytree(folder.parent / "2" / "state", folder / "state")


DAMAGE = [cut, delete, flip, delete_record, number_for_config, number_for_fingerprint, empty, another_state]
