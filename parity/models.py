"""The models that can be compared by name: small ones beside the published sizes."""

from mae_jax import config
from mae_jax.config import ModelConfig, TransformerConfig

SMALL = {
    # The paper's choices; patches and grid are not square, so that rows and columns cannot be confused.
    "tiny": ModelConfig(
        image_size=(32, 24),
        patch_size=(8, 4),
        encoder=TransformerConfig(width=32, depth=2, heads=2),
        decoder=TransformerConfig(width=24, depth=2, heads=3),
        norm_pix_loss=True,
    ),
    # The paper's alternatives.
    "tiny_ablations": ModelConfig(
        image_size=(16, 24),
        patch_size=4,
        in_channels=4,
        encoder=TransformerConfig(width=32, depth=2, heads=2),
        decoder=TransformerConfig(width=24, depth=1, heads=3),
        positions="learned",
        class_token=False,
        masking="block",
        loss_on="all",
        encoder_mask_tokens=True,
    ),
}
TARGETS = {
    # Table 1d's other target.
    "tiny_pca": ModelConfig(
        image_size=(32, 24),
        patch_size=(8, 4),
        encoder=TransformerConfig(width=32, depth=1, heads=2),
        decoder=TransformerConfig(width=24, depth=1, heads=3),
        pca_components=24,
    ),
}
SQUARE = {
    # Of a shape that every other library has.
    "tiny_square": ModelConfig(
        image_size=32,
        patch_size=8,
        encoder=TransformerConfig(width=32, depth=2, heads=2),
        decoder=TransformerConfig(width=24, depth=2, heads=3),
        norm_pix_loss=True,
    ),
}
MODELS = SMALL | TARGETS | SQUARE | config.MODELS
