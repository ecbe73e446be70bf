"""Floating-point operations from the definition: two for a multiply-add, matrix products alone.

Not what a compiler executes: recomputation does not count, and what it merges or drops does.
"""

from mae_jax.config import ModelConfig, TransformerConfig


def stack_flops(stack: TransformerConfig, tokens: int) -> int:
    """Count one forward pass of one sequence through the blocks."""
    dense = tokens * (4 * stack.width**2 + 2 * stack.width * stack.mlp_width)  # qkv, proj; fc1, fc2
    attention = 2 * tokens**2 * stack.width  # q k^T, weights v
    return 2 * stack.depth * (dense + attention)


def forward_flops(config: ModelConfig) -> int:
    """Count one image's forward pass as the paper describes it: every patch is projected, and every patch predicted."""
    # The encoder's sequence, then the decoder's; at the ends the projections of patches, latents and predictions.
    extra = int(config.class_token)
    seen = (config.num_patches if config.encoder_mask_tokens else config.keep) + extra
    full = config.num_patches + extra
    width, decoder_width = config.encoder.width, config.decoder.width
    ends = (
        config.num_patches * config.patch_dim * width
        + seen * width * decoder_width
        + config.num_patches * decoder_width * config.target_dim
    )
    return 2 * ends + stack_flops(config.encoder, seen) + stack_flops(config.decoder, full)


def training_flops(config: ModelConfig) -> int:
    """Count one image's training step: forward, and twice as much backward."""
    return 3 * forward_flops(config)
