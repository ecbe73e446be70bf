"""The models that can be compared by name: small ones beside the published sizes."""

from mae_jax import config
from mae_jax.config import ModelConfig, TransformerConfig

ENCODER, DECODER = TransformerConfig(width=32, depth=2, heads=2), TransformerConfig(width=24, depth=2, heads=3)
SHALLOW = TransformerConfig(width=24, depth=1, heads=3)

# Together they have every choice that a model offers, each away from where a mistake would not show: patches and grids
# are not square, so that rows and columns cannot be confused, and ratios differ, so that a half or a quarter cannot
# stand for what it should have been computed from.
SMALL = {
    # The paper's choices.
    "tiny": ModelConfig((32, 24), (8, 4), 3, ENCODER, DECODER, norm_pix_loss=True),
    # The paper's alternatives, all at once.
    "tiny_ablations": ModelConfig(
        (16, 24), 4, 4, ENCODER, SHALLOW,
        positions="learned", class_token=False, masking="block", mask_ratio=0.6, loss_on="all",
        encoder_mask_tokens=True,
    ),
    # Table 1d's other target; 20 patches, of which one stays: 20 * (1 - 0.9) is less than 2 in float64.
    "tiny_pca": ModelConfig((32, 20), (8, 4), 3, SHALLOW, SHALLOW, mask_ratio=0.9, pca_components=24),
    # Many channels, 1-D positions, one patch of every 2 x 2, and blocks that are computed again going backwards.
    "tiny_remat": ModelConfig(
        (8, 24), (2, 4), 12, ENCODER, DECODER, positions="sincos1d", masking="grid", remat=True,
    ),
    # Learned positions with the class token's own; mask tokens behind a class token in the encoder.
    "tiny_tokens": ModelConfig(
        (24, 16), (4, 8), 1, ENCODER, SHALLOW,
        positions="learned", mask_ratio=0.5, norm_pix_loss=True, encoder_mask_tokens=True,
    ),
}  # fmt: skip
SQUARE = {
    # Of a shape that every other library has.
    "tiny_square": ModelConfig(32, 8, 3, ENCODER, DECODER, norm_pix_loss=True),
}
MODELS = SMALL | SQUARE | config.MODELS
