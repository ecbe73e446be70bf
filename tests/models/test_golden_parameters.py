"""Every parameter of ViT-B in a text file: a change of shape, start or decay shows as a line of a diff.

To write the file anew: python -m tests.models.test_golden_parameters
"""

import difflib
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax import rng
from mae_jax.config import MODELS
from mae_jax.models.mae import MaskedAutoencoder
from mae_jax.train.optimizers import decay_mask

FILE = Path(__file__).parents[1] / "golden" / "vit_base_parameters.txt"
CONFIG = MODELS["vit_base_patch16"]


def inputs(config):
    images = jax.ShapeDtypeStruct((1, *config.image_hw, config.in_channels), jnp.float32)
    return images, jax.ShapeDtypeStruct((1, config.num_patches), jnp.float32)


@functools.cache
def initial_parameters():
    """Path to values, of seed 0. Only the initialisers run: what they do not need is not compiled."""
    zeros = [jnp.zeros(value.shape, value.dtype) for value in inputs(CONFIG)]
    params = jax.jit(MaskedAutoencoder(CONFIG).init)(rng.device_key(0, "init"), *zeros)["params"]
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(params)}, params


def start(values):
    """How a parameter begins: its one value, or the deviation of its values."""
    if (values == values.flat[0]).all():
        return f"all {values.flat[0]:g}"
    return f"std {values.std():.1e}"


def table():
    flat, params = initial_parameters()
    decays = {"/".join(k.key for k in path): leaf for path, leaf in jax.tree.leaves_with_path(decay_mask(params))}
    rows = [
        (path, " x ".join(map(str, leaf.shape)), start(np.asarray(leaf)), "decay" if decays[path] else "no decay")
        for path, leaf in flat.items()
    ]
    total = sum(leaf.size for leaf in flat.values())
    return "".join(f"{path:38} {shape:14} {begin:12} {decay}\n" for path, shape, begin, decay in rows) + (
        f"{len(rows)} parameters, {total} values\n"
    )


def test_the_parameters_of_vit_base():
    golden, found = (text.splitlines(keepends=True) for text in (FILE.read_text(), table()))
    difference = "".join(difflib.unified_diff(golden, found, "golden", "found", n=0))
    assert not difference, f"{difference}If this is meant: python -m tests.models.test_golden_parameters"


def expected_deviation(path, shape):
    """From the contract, not from the code: xavier uniform, token normal(0.02), torch's bias of a convolution."""
    if path.endswith("token"):
        return 0.02
    if path == "encoder/patch_embed/bias":
        return CONFIG.patch_dim**-0.5 / math.sqrt(3)  # uniform on -bound .. bound
    if path.endswith("kernel"):
        return math.sqrt(2 / (shape[0] + shape[1]))
    return 0.0


def test_the_deviations_are_what_theory_says():
    flat, _ = initial_parameters()
    off = {}
    for path, leaf in flat.items():
        values, expected = np.asarray(leaf, np.float64), expected_deviation(path, leaf.shape)
        # The deviation of n values is known to about 1 / sqrt(2 n); five times that is no accident.
        if abs(values.std() - expected) > 5 * expected / math.sqrt(2 * values.size):
            off[path] = (values.std(), expected)
        bound = math.sqrt(3) * expected
        if (
            path.endswith(("kernel", "patch_embed/bias"))
            and not 0.98 * bound < np.abs(values).max() <= bound * 1.000001
        ):
            off[path] = (np.abs(values).max(), bound)
        if path.endswith("scale") and not (values == 1).all():
            off[path] = "scales are not 1"
    assert off == {}


# Trained parameters with the decoder. The files of the authors hold 111,907,840 for ViT-B: the two frozen
# tables of positions, 197 x (768 + 512), on top.
COUNTS = {
    "vit_base_patch16": 111_907_840 - 197 * (768 + 512),
    "vit_large_patch16": 329_541_888 - 197 * (1024 + 512),
    "vit_huge_patch14": 657_074_508 - 257 * (1280 + 512),
}


def counted_by_hand(config):
    """Weights and biases added up from widths and depths."""

    def stack(width, depth):
        return depth * (4 * width + 3 * width * (width + 1) + width * (width + 1) + width * (8 * width) + 5 * width)

    D, d, P = config.encoder.width, config.decoder.width, config.patch_dim
    encoder = P * D + D + D + stack(D, config.encoder.depth) + 2 * D
    decoder = D * d + d + d + stack(d, config.decoder.depth) + 2 * d + d * P + P
    return encoder + decoder


@pytest.mark.parametrize("name", MODELS)
def test_how_many_parameters_a_size_has(name):
    model = MaskedAutoencoder(MODELS[name])
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs(MODELS[name]))["params"]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert count == counted_by_hand(MODELS[name])
    assert count == COUNTS.get(name, count)


if __name__ == "__main__":
    FILE.write_text(table())
    print(f"wrote {FILE}")
