"""Operations counted by hand, on models small enough for it."""

from dataclasses import replace

import pytest

from mae_jax.config import ModelConfig, TransformerConfig
from mae_jax.models.flops import forward_flops, stack_flops, training_flops

ENCODER, DECODER = TransformerConfig(4, 2, 1, 2.0), TransformerConfig(8, 1, 1, 4.0)
MODEL = ModelConfig((4, 6), 2, 1, ENCODER, DECODER, mask_ratio=0.5)  # 6 patches of 4 values, of which 3 are seen


def test_a_stack_is_its_products():
    # Of 5 tokens: qkv 4 x 12, proj 4 x 4, fc1 4 x 8, fc2 8 x 4; then q k^T and its product with v, 5 x 5 x 4 each.
    block = 5 * (4 * 12 + 4 * 4 + 4 * 8 + 8 * 4) + 2 * 5 * 5 * 4
    assert stack_flops(ENCODER, 5) == 2 * 2 * block


@pytest.mark.parametrize(
    ("changes", "seen", "full", "predicted"),
    [
        ({}, 4, 7, 4),
        ({"class_token": False}, 3, 6, 4),
        ({"encoder_mask_tokens": True}, 7, 7, 4),
        ({"pca_components": 3}, 4, 7, 3),
        ({"mask_ratio": 0.6}, 3, 7, 4),
    ],
)
def test_a_forward_pass_is_its_stacks_and_three_projections(changes, seen, full, predicted):
    model = replace(MODEL, **changes)
    projections = 6 * 4 * 4 + seen * 4 * 8 + 6 * 8 * predicted
    assert forward_flops(model) == 2 * projections + stack_flops(ENCODER, seen) + stack_flops(DECODER, full)
    assert training_flops(model) == 3 * forward_flops(model)
