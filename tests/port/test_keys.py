"""The table between this project's parameters and the authors' keys: complete, exact, and plain about what is wrong."""

import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.config import MODELS, ModelConfig, TransformerConfig
from mae_jax.models.mae import MaskedAutoencoder
from mae_jax.port.keys import entries, from_fair, frozen_tables, to_fair

CONFIG = ModelConfig((8, 12), (2, 4), 3, TransformerConfig(8, 2, 2), TransformerConfig(4, 1, 2))
CONFIGS = {
    "paper": CONFIG,
    "no class token": replace(CONFIG, class_token=False),
    "learned positions": replace(CONFIG, positions="learned"),
    "encoder mask tokens": replace(CONFIG, encoder_mask_tokens=True),
    "12 channels": replace(CONFIG, in_channels=12),
}


def tensors_for(config: ModelConfig) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {entry.key: generator.standard_normal(entry.shape) for entry in entries(config)}


@pytest.mark.parametrize("name", CONFIGS)
def test_covers_every_parameter_of_the_model(name):
    config = CONFIGS[name]
    shapes = jax.eval_shape(
        MaskedAutoencoder(config).init,
        jax.random.key(0),
        jnp.zeros((1, *config.image_hw, config.in_channels)),
        jnp.zeros((1, config.num_patches)),
    )["params"]
    ours = jax.tree.map(np.shape, from_fair(tensors_for(config), config), is_leaf=lambda x: isinstance(x, np.ndarray))
    assert ours == jax.tree.map(lambda leaf: leaf.shape, dict(shapes))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_there_and_back_is_exact(name, dtype):
    config = CONFIGS[name]
    tensors = {key: values.astype(dtype) for key, values in tensors_for(config).items()}
    returned = to_fair(from_fair(tensors, config), config)
    assert returned.keys() == tensors.keys() | frozen_tables(config).keys()
    for key, values in tensors.items():
        assert returned[key].dtype == dtype
        np.testing.assert_array_equal(returned[key], values)


def test_patch_projection_takes_rows_then_columns_then_channels():
    tensors = tensors_for(CONFIG)
    kernel = from_fair(tensors, CONFIG)["encoder"]["patch_embed"]["kernel"]
    row, column, channel = 1, 2, 1
    np.testing.assert_array_equal(
        kernel[(row * 4 + column) * 3 + channel], tensors["patch_embed.proj.weight"][:, channel, row, column]
    )


def test_every_published_size_has_the_authors_keys():
    """150 and some tensors for ViT-B with its decoder, positions included."""
    keys = [entry.key for entry in entries(MODELS["vit_base_patch16"])]
    assert len(keys) == len(set(keys)) == 12 * 12 + 8 * 12 + 12
    assert {"blocks.11.attn.qkv.bias", "decoder_blocks.7.mlp.fc2.weight", "decoder_pred.bias", "cls_token"} <= set(keys)


def test_frozen_tables_may_be_absent_and_are_checked():
    tensors = tensors_for(CONFIG)
    from_fair(tensors | frozen_tables(CONFIG), CONFIG)
    moved = {"pos_embed": frozen_tables(CONFIG)["pos_embed"] + 0.01}
    with pytest.raises(ValueError, match="pos_embed is not the sincos2d table"):
        from_fair(tensors | moved, CONFIG)


def test_all_that_is_wrong_with_tensors_is_listed():
    tensors = tensors_for(CONFIG)
    del tensors["norm.bias"]
    tensors["head.weight"] = np.zeros(3)
    tensors["blocks.1.attn.qkv.weight"] = tensors["blocks.1.attn.qkv.weight"].T
    with pytest.raises(ValueError, match="do not fit") as raised:
        from_fair(tensors, CONFIG)
    for fault in (
        "norm.bias is missing",
        "head.weight is unknown",
        "blocks.1.attn.qkv.weight has shape (8, 24), not (24, 8)",
    ):
        assert fault in str(raised.value)


def test_all_that_is_wrong_with_parameters_is_listed():
    params = from_fair(tensors_for(CONFIG), CONFIG)
    del params["encoder"]["norm"]["bias"]
    params["encoder"]["head"] = {"kernel": np.zeros(3)}
    params["decoder"]["pred"]["kernel"] = np.zeros((2, 2))
    with pytest.raises(ValueError, match="do not fit") as raised:
        to_fair(params, CONFIG)
    for fault in (
        "encoder/norm/bias is missing",
        "encoder/head/kernel is unknown",
        "decoder/pred/kernel has shape (2, 2), not (4, 24)",
    ):
        assert fault in str(raised.value)


def test_needs_no_torch():
    code = "import sys, mae_jax.port.keys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
