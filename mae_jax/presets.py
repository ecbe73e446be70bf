"""Named recipes. Each docstring: command, cost, expected figure, source."""

from collections.abc import Callable

from mae_jax.config import AugmentConfig, ModelConfig, OptimConfig, PretrainConfig, TransformerConfig


def digits() -> PretrainConfig:
    """A small encoder on the 1,797 bundled handwritten digits (8x8, patch 2)."""
    return PretrainConfig(
        model=ModelConfig(
            image_size=8,
            patch_size=2,
            in_channels=1,
            encoder=TransformerConfig(width=64, depth=4, heads=4),
            decoder=TransformerConfig(width=32, depth=2, heads=4),
        ),
        augment=AugmentConfig(scale=(0.6, 1.0), flip=False, mean=(0.305,), std=(0.376,)),
        optim=OptimConfig(base_lr=2e-3, warmup_epochs=20),
        data="digits",
        batch_size=256,
        epochs=400,
        workdir="runs/digits",
        log_every=100,
        save_every=1000,
        reconstruct_every=1000,
    )


PRESETS: dict[str, Callable[[], PretrainConfig]] = {"digits": digits}
