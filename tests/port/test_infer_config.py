"""The configuration comes back from the shapes; what is in no tensor is asked for."""

from dataclasses import replace

import numpy as np
import pytest

from mae_jax.config import MODELS, ModelConfig, TransformerConfig
from mae_jax.port.infer_config import Hints, infer_config
from mae_jax.port.keys import entries, frozen_tables, to_fair
from tests.refusals import refused

from .conftest import CLASSIFIERS, ODD, TINY, draw_params

CONFIGS = {
    "tiny": TINY,
    "odd": ODD,
    "learned": replace(TINY, positions="learned"),
    "sincos1d, no class token": replace(TINY, positions="sincos1d", class_token=False),
    "not square": replace(TINY, image_size=(32, 48), patch_size=(4, 8)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_comes_back(name):
    config = CONFIGS[name]
    size = config.image_size if name == "not square" else None
    given = Hints(config.encoder.heads, config.decoder.heads, size, config.mask_ratio, config.norm_pix_loss)
    assert infer_config(to_fair(draw_params(config), config), given, "float32") == config


@pytest.mark.parametrize("name", MODELS)
def test_heads_of_published_widths_are_known(name):
    config = MODELS[name]
    shapes = {entry.key: np.broadcast_to(np.float32(0), entry.shape) for entry in entries(config)}
    assert infer_config(shapes | frozen_tables(config), Hints(), "float32") == config


@pytest.mark.parametrize("pooling", CLASSIFIERS)
def test_classifiers_are_known_by_their_norm(pooling):
    config = CLASSIFIERS[pooling]
    found = infer_config(to_fair(draw_params(config), config), Hints(encoder_heads=3), "float32")
    assert found == replace(config, model=replace(TINY, decoder=ModelConfig.decoder, norm_pix_loss=False))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_rounded_table_is_still_frozen_and_a_trained_one_is_not(dtype):
    tensors = {key: values.astype(dtype) for key, values in to_fair(draw_params(TINY), TINY).items()}
    given = Hints(3, 4)
    assert infer_config(tensors, given, "float32").positions == "sincos2d"
    trained = tensors["pos_embed"].copy()
    trained[0, 3, 5] += 0.01
    assert infer_config(tensors | {"pos_embed": trained}, given, "float32").positions == "learned"


def faulty(**changes):
    return {key: values for key, values in (to_fair(draw_params(TINY), TINY) | changes).items() if values is not None}


@pytest.mark.parametrize(
    ("tensors", "hints", "field", "words"),
    [
        (faulty(), Hints(), "encoder_heads", "give --encoder-heads (width 48) and --decoder-heads (width 32)"),
        (
            faulty(),
            Hints(encoder_heads=3),
            "decoder_heads",
            "--decoder-heads (width 32); in Python decoder_heads=",
        ),
        (faulty(), Hints(0, 4), "encoder_heads", "encoder: heads 0 must be a whole number, 1 or more"),
        (faulty(), Hints(3, 0), "decoder_heads", "decoder: heads 0 must be a whole number, 1 or more"),
        (faulty(), Hints(5, 4), "encoder_heads", "encoder: width 48 is not divisible by heads 5"),
        (faulty(pos_embed=None), Hints(3, 4), "pos_embed", "pos_embed is missing"),
        (faulty(pos_embed=np.zeros((1, 13, 48))), Hints(3, 4), "source_image_size", "12 patches, which is no square"),
        (faulty(), Hints(3, 4, image_size=64), "source_image_size", "does not give the 16 patches"),
        (faulty(), Hints(3, 4, mask_ratio=0.99), "source", "mask_ratio 0.99 keeps none"),
        (
            faulty(**{"blocks.300000000.norm1.weight": np.zeros(48)}),
            Hints(3, 4),
            "blocks.2",
            "blocks.2 is missing, and blocks.300000000 is there",
        ),
        (
            faulty(**{"patch_embed.proj.weight": np.zeros((0, 3, 8, 8))}),
            Hints(3, 4),
            "patch_embed.proj.weight",
            "8, 8), which holds nothing",
        ),
        (faulty(**{"decoder_embed.weight": np.zeros((0, 48))}), Hints(3, 4), "decoder_embed.weight", "shape (0, 48)"),
        (faulty(**{"head.weight": np.float32(1)}), Hints(3, 4), "head.weight", "has shape (), where 2 dimensions"),
        ({"patch_embed.proj.weight": np.zeros((3, 4))}, Hints(), "patch_embed.proj.weight", "where 4 dimensions"),
    ],
)
def test_what_is_not_known_is_asked_for(tensors, hints, field, words):
    with refused(field, words):
        infer_config(tensors, hints, "float32")


def test_hints_go_one_over_the_other():
    assert Hints(1, None, 32).over(Hints(2, 4, None, 0.5)) == Hints(1, 4, 32, 0.5, None)


def test_a_stack_is_as_deep_as_it_is_numbered():
    config = replace(TINY, encoder=TransformerConfig(48, 11, 3))
    assert infer_config(to_fair(draw_params(config), config), Hints(3, 4), "float32").encoder.depth == 11


@pytest.mark.parametrize("key", ["blocks.x.norm1.weight", "blocks.", "decoder_blocks.\u00b2.norm1.weight"])
def test_a_block_without_a_number_says_nothing_of_the_depth(key):
    """It is unknown to the model, and is named as such where the tensors are taken."""
    given = Hints(3, 4, 32, TINY.mask_ratio, TINY.norm_pix_loss)
    assert infer_config(faulty(**{key: np.zeros(48)}), given, "float32") == TINY


def test_a_table_for_no_image_is_not_frozen():
    empty = np.zeros((0, 17, 32), np.float32)
    assert infer_config(faulty(decoder_pos_embed=empty), Hints(3, 4), "float32").positions == "learned"
