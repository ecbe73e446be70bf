"""Named recipes for encoders that are pretrained: fine-tuning and linear probing.

`--init` gives the weights, of a run or of a PyTorch checkpoint; without it the encoder begins with random ones.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mae_jax.config import AugmentConfig, FinetuneConfig, MixConfig, ModelConfig, OptimConfig
from mae_jax.presets.pretraining import PRESETS


def _pretrained(name: str) -> tuple[ModelConfig, AugmentConfig, str]:
    """Return model, images and data of a pretraining recipe."""
    recipe = PRESETS[name]()
    return recipe.model, recipe.augment, recipe.data


# --- fine-tuning -------------------------------------------------------------------------------------------------


def _imagenet_finetune(
    name: str, base_lr: float, epochs: float, layer_decay: float, drop_path: float
) -> FinetuneConfig:
    """Make a recipe of the paper's Table 9 (He et al. 2021) with the values that the authors publish for each size.

    Source: https://github.com/facebookresearch/mae/blob/main/FINETUNE.md. Positions are learnt from the frozen table
    on, as in the authors' code.
    """
    model, _, data = _pretrained(f"imagenet_{name}")
    return FinetuneConfig(
        model=replace(model, positions="learned"),
        augment=AugmentConfig(scale=(0.08, 1.0), rand_augment=9.0, evaluation_crop=0.875),
        optim=OptimConfig(base_lr=base_lr, min_lr=1e-6, warmup_epochs=5, beta2=0.999),
        data=data,
        batch_size=1024,
        epochs=epochs,
        workdir=f"runs/finetune_{name}",
        layer_decay=layer_decay,
        drop_path=drop_path,
        mix=MixConfig(smoothing=0.1, mixup=0.8, cutmix=1.0, erase=0.25),
    )


def imagenet_vit_base() -> FinetuneConfig:
    """Fine-tune ViT-B/16 for 100 epochs end to end (He et al. 2021, Table 9).

    mae-jax finetune imagenet_vit_base --init runs/imagenet_vit_base_patch16 --data folder:PATH
    105 GFLOP an image x 1.28 M x 100 = 1.35e19 FLOP; 83.6 % top-1 after 1,600 epochs of pretraining (Table 3).
    """
    return _imagenet_finetune("vit_base", 5e-4, 100, 0.65, 0.1)


def imagenet_vit_large() -> FinetuneConfig:
    """Fine-tune ViT-L/16 for 50 epochs end to end (He et al. 2021, Table 9).

    mae-jax finetune imagenet_vit_large --init runs/imagenet_vit_large_patch16 --data folder:PATH
    369 GFLOP an image x 1.28 M x 50 = 2.4e19 FLOP; 85.9 % top-1 after 1,600 epochs of pretraining (Table 3).
    """
    return _imagenet_finetune("vit_large", 1e-3, 50, 0.75, 0.2)


def imagenet_vit_huge() -> FinetuneConfig:
    """Fine-tune ViT-H/14 for 50 epochs end to end (He et al. 2021, Table 9).

    At a higher resolution with --model.image-size 448 --augment.evaluation-crop 1 (the authors crop evaluations up to
    224 only).

    mae-jax finetune imagenet_vit_huge --init runs/imagenet_vit_huge_patch14 --data folder:PATH
    1,004 GFLOP an image x 1.28 M x 50 = 6.4e19 FLOP; 86.9 % top-1 after 1,600 epochs of pretraining (Table 3).
    """
    return _imagenet_finetune("vit_huge", 1e-3, 50, 0.75, 0.3)


def digits() -> FinetuneConfig:
    """Fine-tune the whole encoder of `mae-jax pretrain digits` on four fifths of the digits.

    mae-jax finetune digits --init runs/digits    (half a minute on two cores)
    """
    model, augment, data = _pretrained("digits")
    return FinetuneConfig(
        model=model,
        augment=augment,
        optim=OptimConfig(base_lr=4e-3, warmup_epochs=2, beta2=0.999),
        data=data,
        batch_size=64,
        epochs=20,
        workdir="runs/finetune_digits",
        layer_decay=0.75,
        mix=MixConfig(smoothing=0.1),
        log_every=50,
        save_every=200,
        evaluate_every=5,
    )


def cifar10_tiny() -> FinetuneConfig:
    """Fine-tune ViT-Tiny with patches of 2 on CIFAR-10 for 100 epochs, on the class token, images as they are.

    mae-jax finetune cifar10_tiny --init runs/cifar10_tiny --data folder:PATH
    10 GFLOP an image x 50,000 x 100 = 5e16 FLOP. A PyTorch run of this recipe reports 89.77 % with pretraining and
    74.13 % without (https://github.com/IcarusWizard/MAE); it decays every parameter, begins with PyTorch's head, and
    its rate follows min(warm-up, cosine) epoch by epoch.
    """
    model, augment, data = _pretrained("cifar10_tiny")
    return FinetuneConfig(
        model=model,
        augment=augment,
        optim=OptimConfig(base_lr=1e-3, warmup_epochs=5, beta2=0.999),
        data=data,
        batch_size=128,
        epochs=100,
        workdir="runs/finetune_cifar10_tiny",
        pooling="class",
    )


def mnist_tutorial() -> FinetuneConfig:
    """Fine-tune the encoder of `mae-jax pretrain mnist_tutorial` for ten epochs with its own optimizer.

    mae-jax finetune mnist_tutorial --init runs/mnist_tutorial
    """
    model, augment, data = _pretrained("mnist_tutorial")
    return FinetuneConfig(
        model=model,
        augment=augment,
        optim=PRESETS["mnist_tutorial"]().optim,
        data=data,
        batch_size=128,
        epochs=10,
        workdir="runs/finetune_mnist_tutorial",
    )


FINETUNE: dict[str, Callable[[], FinetuneConfig]] = {
    recipe.__name__: recipe
    for recipe in (digits, cifar10_tiny, mnist_tutorial, imagenet_vit_base, imagenet_vit_large, imagenet_vit_huge)
}


# --- linear probing ----------------------------------------------------------------------------------------------


def _probe(name: str, workdir: str, **changes: Any) -> FinetuneConfig:
    """Make a recipe of the paper's Table 10: a frozen encoder, BatchNorm without scale and bias, a linear head."""
    model, augment, data = _pretrained(name)
    config = FinetuneConfig(
        model=model,
        augment=augment,
        optim=OptimConfig(optimizer="lars", base_lr=0.1, warmup_epochs=10, weight_decay=0.0),
        data=data,
        epochs=90,
        workdir=workdir,
        pooling="class" if model.class_token else "mean",
        last_blocks=0,
        batch_norm=True,
        head_std=0.01,
    )
    return replace(config, **changes)


def _imagenet_probe(name: str) -> FinetuneConfig:
    """Make the paper's recipe of linear probing on ImageNet."""
    augment = AugmentConfig(scale=(0.08, 1.0), evaluation_crop=0.875)
    return _probe(f"imagenet_{name}", f"runs/probe_{name}", augment=augment, batch_size=16384)


def probe_imagenet_vit_base() -> FinetuneConfig:
    """Train a linear head on the frozen ViT-B/16 for 90 epochs (He et al. 2021, Table 10).

    mae-jax probe imagenet_vit_base --init runs/imagenet_vit_base_patch16 --data folder:PATH
    35 GFLOP an image x 1.28 M x 90 = 4.0e18 FLOP; the authors publish 67.8 % top-1 for their checkpoint
    (https://github.com/facebookresearch/mae/blob/main/FINETUNE.md).
    """
    return _imagenet_probe("vit_base")


def probe_imagenet_vit_large() -> FinetuneConfig:
    """Train a linear head on the frozen ViT-L/16 for 90 epochs (He et al. 2021, Table 10; the authors: 50 suffice).

    mae-jax probe imagenet_vit_large --init runs/imagenet_vit_large_patch16 --data folder:PATH
    123 GFLOP an image x 1.28 M x 90 = 1.4e19 FLOP; the authors publish 76.0 % top-1 for their checkpoint
    (https://github.com/facebookresearch/mae/blob/main/FINETUNE.md).
    """
    return _imagenet_probe("vit_large")


def probe_imagenet_vit_huge() -> FinetuneConfig:
    """Train a linear head on the frozen ViT-H/14 for 90 epochs (He et al. 2021, Table 10; the authors: 50 suffice).

    mae-jax probe imagenet_vit_huge --init runs/imagenet_vit_huge_patch14 --data folder:PATH
    335 GFLOP an image x 1.28 M x 90 = 3.9e19 FLOP; the authors publish 77.2 % top-1 for their checkpoint
    (https://github.com/facebookresearch/mae/blob/main/FINETUNE.md).
    """
    return _imagenet_probe("vit_huge")


def probe_digits() -> FinetuneConfig:
    """Train a linear head on the frozen encoder of `mae-jax pretrain digits`, on four fifths of the digits.

    mae-jax probe digits --init runs/digits    (half a minute on two cores)
    """
    return _probe(
        "digits",
        "runs/probe_digits",
        optim=OptimConfig(optimizer="lars", base_lr=32.0, warmup_epochs=2, weight_decay=0.0),
        batch_size=256,
        epochs=30,
        pooling="mean",
        log_every=50,
        save_every=200,
        evaluate_every=10,
    )


def probe_cifar10_tiny() -> FinetuneConfig:
    """Train a linear head on the frozen encoder of `mae-jax pretrain cifar10_tiny`.

    mae-jax probe cifar10_tiny --init runs/cifar10_tiny --data folder:PATH
    3.34 GFLOP an image x 50,000 x 90 = 1.5e16 FLOP.
    """
    return _probe("cifar10_tiny", "runs/probe_cifar10_tiny", batch_size=2048)


PROBE: dict[str, Callable[[], FinetuneConfig]] = {
    recipe.__name__.removeprefix("probe_"): recipe
    for recipe in (
        probe_digits,
        probe_cifar10_tiny,
        probe_imagenet_vit_base,
        probe_imagenet_vit_large,
        probe_imagenet_vit_huge,
    )
}
