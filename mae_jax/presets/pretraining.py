"""Named recipes of pretraining. Each docstring: command, cost, expected figure, source."""

from collections.abc import Callable
from dataclasses import replace

from mae_jax.config import MODELS, AugmentConfig, ModelConfig, OptimConfig, PretrainConfig, TransformerConfig

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def digits() -> PretrainConfig:
    """Pretrain a small encoder on the 1,797 bundled handwritten digits (8x8, patch 2).

    mae-jax pretrain digits    (1.5 minutes on two cores; 20-NN accuracy 87 %, untrained 59 %)
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
    """Pretrain 2.8 M parameters on CIFAR-10's 32x32 photographs as image files, patch 4, for a first look on a CPU.

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
        augment=AugmentConfig(mean=CIFAR10_MEAN, std=CIFAR10_STD),
        optim=OptimConfig(base_lr=1e-3, warmup_epochs=1),
        data="folder:cifar10",
        batch_size=256,
        epochs=10,
        workdir="runs/cifar10_small",
        log_every=20,
        save_every=200,
        reconstruct_every=200,
    )


def cifar10_tiny() -> PretrainConfig:
    """Pretrain ViT-Tiny on CIFAR-10 at patch 2: whole images, no crops or flips, positions learnt, plain pixels.

    mae-jax pretrain cifar10_tiny --data folder:PATH    (PATH/train/<class>/*.jpg)
    5.55 GFLOP an image x 50,000 x 2,000 = 5.5e17 FLOP.
    A PyTorch run of this recipe (github.com/IcarusWizard/MAE) reports 89.77 % on the test images after 100 epochs of
    fine-tuning, and 74.13 % without pretraining; its decoder has no LayerNorm at its end.
    """
    return PretrainConfig(
        model=ModelConfig(
            image_size=32,
            patch_size=2,
            encoder=TransformerConfig(width=192, depth=12, heads=3),
            decoder=TransformerConfig(width=192, depth=4, heads=3),
            positions="learned",
        ),
        augment=AugmentConfig(crop="center", flip=False, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        optim=OptimConfig(base_lr=1.5e-4, warmup_epochs=200),
        data="folder:cifar10",
        batch_size=4096,
        epochs=2000,
        workdir="runs/cifar10_tiny",
    )


def mnist_tutorial() -> PretrainConfig:
    """Pretrain 155 thousand parameters on MNIST's 28x28 digits, patch 4, no class token: the size of a tutorial.

    mae-jax pretrain mnist_tutorial    (TFDS_DATA_DIR is where TensorFlow Datasets has put MNIST)
    0.0171 GFLOP an image x 60,000 x 64 = 6.6e13 FLOP. No figure is published for it.
    """
    return PretrainConfig(
        model=ModelConfig(
            image_size=28,
            patch_size=4,
            in_channels=1,
            encoder=TransformerConfig(width=64, depth=4, heads=4, mlp_ratio=2.0),
            decoder=TransformerConfig(width=32, depth=2, heads=4, mlp_ratio=2.0),
            positions="sincos1d",
            class_token=False,
        ),
        augment=AugmentConfig(crop="center", flip=False, mean=(0.1307,), std=(0.3081,)),
        optim=OptimConfig(base_lr=3e-4, warmup_epochs=0, schedule="constant"),  # 1.5e-4 at a batch of 128
        data="tfds:mnist",
        batch_size=128,
        epochs=64,
        workdir="runs/mnist_tutorial",
    )


def lightly_voc() -> PretrainConfig:
    """Pretrain ViT-B/32 with a decoder of one block on Pascal VOC 2012, 10 epochs: Lightly's example of MAE.

    mae-jax pretrain lightly_voc    (TFDS_DATA_DIR is where TensorFlow Datasets has put VOC)
    On two hosts, each with its own number: mae-jax pretrain lightly_voc --engine jit --coordinator HOST:PORT
    --num-processes 2 --process-id 0; several GPUs of one host need no flag. The batch of 256 is divided among all.
    8.79 GFLOP an image x 5,717 x 10 = 5.0e14 FLOP. Its source, docs.lightly.ai/examples/mae.html,
    gives no figure. AdamW has PyTorch's defaults there.
    """
    return PretrainConfig(
        model=ModelConfig(patch_size=32, decoder=TransformerConfig(width=512, depth=1, heads=16)),
        optim=OptimConfig(
            base_lr=1.5e-4, warmup_epochs=0, schedule="constant", weight_decay=0.01, beta1=0.9, beta2=0.999
        ),
        data="tfds:voc/2012",
        batch_size=256,
        epochs=10,
        workdir="runs/lightly_voc",
        save_every=100,
        reconstruct_every=100,
    )


def _imagenet(model: str, epochs: float) -> PretrainConfig:
    """Make a recipe of the paper's Table 8 (He et al. 2021), with normalised pixels (Table 1d)."""
    return PretrainConfig(
        model=replace(MODELS[model], norm_pix_loss=True, dtype="bfloat16"),
        optim=OptimConfig(base_lr=1.5e-4, warmup_epochs=40),
        data="folder:imagenet",
        batch_size=4096,
        epochs=epochs,
        workdir=f"runs/imagenet_{model}",
    )


def imagenet_vit_small() -> PretrainConfig:
    """Pretrain ViT-S/16 for 800 epochs on normalised pixels: the paper's recipe on a size that it does not report.

    mae-jax pretrain imagenet_vit_small --data folder:PATH
    39.0 GFLOP an image x 1.28 M x 800 = 4.0e19 FLOP.
    """
    return _imagenet("vit_small_patch16", 800)


def imagenet_vit_base() -> PretrainConfig:
    """Pretrain ViT-B/16 for 1,600 epochs on normalised pixels (He et al. 2021, Table 8).

    mae-jax pretrain imagenet_vit_base --data folder:PATH    (--epochs 800: the paper's shorter schedule)
    58.7 GFLOP an image x 1.28 M x 1,600 = 1.2e20 FLOP; fine-tunes to 83.6 % (Table 3).
    """
    return _imagenet("vit_base_patch16", 1600)


def imagenet_vit_large() -> PretrainConfig:
    """Pretrain ViT-L/16 for 1,600 epochs on normalised pixels (He et al. 2021, Table 8).

    mae-jax pretrain imagenet_vit_large --data folder:PATH    (--epochs 800: the paper's shorter schedule)
    124.5 GFLOP an image x 1.28 M x 1,600 = 2.6e20 FLOP; fine-tunes to 85.9 % (Table 3).
    """
    return _imagenet("vit_large_patch16", 1600)


def imagenet_vit_huge() -> PretrainConfig:
    """Pretrain ViT-H/14 for 1,600 epochs on normalised pixels (He et al. 2021, Table 8).

    mae-jax pretrain imagenet_vit_huge --data folder:PATH    (--epochs 800: the paper's shorter schedule)
    291 GFLOP an image x 1.28 M x 1,600 = 6.0e20 FLOP; fine-tunes to 86.9 % (Table 3).
    """
    return _imagenet("vit_huge_patch14", 1600)


def vit_base_learned_positions() -> PretrainConfig:
    """Pretrain ViT-B/16 for 1,600 epochs on normalised pixels; encoder and decoder learn their positions.

    mae-jax pretrain vit_base_learned_positions --data folder:PATH    (--epochs 800: the paper's shorter schedule)
    58.7 GFLOP an image x 1.28 M x 1,600 = 1.2e20 FLOP. The paper's positions are fixed: it has no figure for this.
    """
    recipe = _imagenet("vit_base_patch16", 1600)
    return replace(recipe, model=replace(recipe.model, positions="learned"), workdir="runs/vit_base_learned_positions")


PRESETS: dict[str, Callable[[], PretrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        digits,
        cifar10_small,
        cifar10_tiny,
        mnist_tutorial,
        lightly_voc,
        imagenet_vit_small,
        imagenet_vit_base,
        imagenet_vit_large,
        imagenet_vit_huge,
        vit_base_learned_positions,
    )
}
