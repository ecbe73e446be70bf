"""Named recipes. Each docstring: command, cost, expected figure, source."""

from collections.abc import Callable
from dataclasses import replace

from mae_jax.config import MODELS, AugmentConfig, ModelConfig, OptimConfig, PretrainConfig, TransformerConfig


def digits() -> PretrainConfig:
    """A small encoder on the 1,797 bundled handwritten digits (8x8, patch 2).

    mae-jax pretrain digits    (1.5 minutes on two cores; 20-NN accuracy 88 %, untrained 56 %)
    """
    return PretrainConfig(
        model=ModelConfig(
            image_size=8,
            patch_size=2,
            in_channels=1,
            encoder=TransformerConfig(width=64, depth=4, heads=4),
            decoder=TransformerConfig(width=32, depth=2, heads=4),
        ),
        augment=AugmentConfig(scale=(0.6, 1.0), flip=False, mean=(0.305,), std=(0.376,)),  # of the 1,797 images
        optim=OptimConfig(base_lr=8e-3, warmup_epochs=10),
        data="digits",
        batch_size=64,
        epochs=60,
        workdir="runs/digits",
        log_every=100,
        save_every=500,
        reconstruct_every=500,
    )


def cifar10_small() -> PretrainConfig:
    """2.8 M parameters on CIFAR-10's 32x32 photographs as image files, patch 4: minutes on a CPU, for a first look.

    mae-jax pretrain cifar10_small --data folder:PATH    (PATH/train/<class>/*.jpg)
    """
    return PretrainConfig(
        model=ModelConfig(
            image_size=32,
            patch_size=4,
            encoder=TransformerConfig(width=192, depth=6, heads=3),
            decoder=TransformerConfig(width=96, depth=2, heads=3),
            norm_pix_loss=True,
        ),
        augment=AugmentConfig(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
        optim=OptimConfig(base_lr=1e-3, warmup_epochs=1),
        data="folder:cifar10",
        batch_size=256,
        epochs=10,
        workdir="runs/cifar10_small",
        log_every=20,
        save_every=200,
        reconstruct_every=200,
    )


def _imagenet(model: str, epochs: float) -> PretrainConfig:
    """The paper's pretraining setting (He et al. 2021, Table 8), with normalised pixels (Table 1d)."""
    return PretrainConfig(
        model=replace(MODELS[model], norm_pix_loss=True, dtype="bfloat16"),
        optim=OptimConfig(base_lr=1.5e-4, warmup_epochs=40),
        data="folder:imagenet",
        batch_size=4096,
        epochs=epochs,
        workdir=f"runs/imagenet_{model}",
    )


def imagenet_vit_small() -> PretrainConfig:
    """ViT-S/16, 800 epochs, normalised pixels: the paper's setting on a size that it does not report.

    mae-jax pretrain imagenet_vit_small --data folder:PATH
    39 GFLOP an image x 1.28 M x 800 = 4.0e19 FLOP.
    """
    return _imagenet("vit_small_patch16", 800)


def imagenet_vit_base() -> PretrainConfig:
    """ViT-B/16, 1,600 epochs, normalised pixels (He et al. 2021, Table 8).

    mae-jax pretrain imagenet_vit_base --data folder:PATH
    58.7 GFLOP an image x 1.28 M x 1,600 = 1.2e20 FLOP; fine-tunes to 83.6 % (Table 3).
    """
    return _imagenet("vit_base_patch16", 1600)


def imagenet_vit_large() -> PretrainConfig:
    """ViT-L/16, 1,600 epochs, normalised pixels (He et al. 2021, Table 8).

    mae-jax pretrain imagenet_vit_large --data folder:PATH
    124.5 GFLOP an image x 1.28 M x 1,600 = 2.6e20 FLOP; fine-tunes to 85.9 % (Table 3).
    """
    return _imagenet("vit_large_patch16", 1600)


def imagenet_vit_huge() -> PretrainConfig:
    """ViT-H/14, 1,600 epochs, normalised pixels (He et al. 2021, Table 8).

    mae-jax pretrain imagenet_vit_huge --data folder:PATH
    291 GFLOP an image x 1.28 M x 1,600 = 6.0e20 FLOP; fine-tunes to 86.9 % (Table 3).
    """
    return _imagenet("vit_huge_patch14", 1600)


PRESETS: dict[str, Callable[[], PretrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        digits,
        cifar10_small,
        imagenet_vit_small,
        imagenet_vit_base,
        imagenet_vit_large,
        imagenet_vit_huge,
    )
}
