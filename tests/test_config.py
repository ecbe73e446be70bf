"""A configuration is valid once it exists; one that cannot work is refused with the fields' names and values."""

import copy
import dataclasses
import math
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mae_jax.config import (
    MODELS,
    AugmentConfig,
    ClassifierConfig,
    FinetuneConfig,
    HostConfig,
    MixConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    TransformerConfig,
)
from mae_jax.presets.pretraining import PRESETS
from mae_jax.storage.workdir import config_to_dict, differences

NARROW = TransformerConfig(width=8, depth=1, heads=2)
ONE_CHANNEL = ModelConfig(image_size=8, patch_size=2, in_channels=1, encoder=NARROW, decoder=NARROW)

REFUSED = {
    "width and heads": (lambda: TransformerConfig(10, 1, 3), ("width 10", "heads 3")),
    "mlp width": (lambda: TransformerConfig(10, 1, 2, mlp_ratio=0.25), ("width 10", "mlp_ratio 0.25")),
    "no depth": (lambda: TransformerConfig(8, 0, 2), ("depth 0",)),
    "patch": (lambda: ModelConfig(patch_size=15), ("image_size 224", "patch_size 15", "14, 16")),
    "patch height": (
        lambda: ModelConfig(image_size=(30, 32), patch_size=(4, 4)),
        ("image_size (30, 32)", "patch_size (4, 4)", "3, 5"),
    ),
    "patch width": (
        lambda: ModelConfig(image_size=(32, 30), patch_size=(4, 8)),
        ("image_size (32, 30)", "patch_size (4, 8)", "6, 10"),
    ),
    "patch larger than the image": (
        lambda: ModelConfig(image_size=8, patch_size=16),
        ("image_size 8", "patch_size 16", "4, 8"),
    ),
    "an image too large to look through": (
        lambda: ModelConfig(image_size=10**12, patch_size=7),
        ("image_size 1000000000000", "patch_size 7", "5, 8"),
    ),
    "no patch": (lambda: ModelConfig(patch_size=0), ("patch_size 0", "image_size 224")),
    "negative image": (lambda: ModelConfig(image_size=-16), ("patch_size 16", "image_size -16")),
    "no channels": (lambda: ModelConfig(in_channels=0), ("in_channels 0",)),
    "cudnn's precision": (lambda: ModelConfig(attention="cudnn"), ("attention cudnn", "bfloat16, not float32")),
    "attention": (lambda: ModelConfig(attention="flash"), ("attention flash is unknown", "xla, cudnn")),
    "precision": (lambda: ModelConfig(dtype="bf16"), ("dtype bf16 is unknown", "float32, bfloat16, float64")),
    "positions": (lambda: ModelConfig(positions="fourier"), ("positions fourier is unknown", "sincos2d, sincos1d")),
    "masking": (lambda: ModelConfig(masking="blocks"), ("masking blocks is unknown", "random, block, grid")),
    "loss": (lambda: ModelConfig(loss_on="visible"), ("loss_on visible is unknown", "hidden, all")),
    "pooling": (lambda: ClassifierConfig(pooling="max"), ("pooling max is unknown", "mean, class")),
    "crop": (lambda: AugmentConfig(crop="centre"), ("crop centre is unknown", "random, fixed, center")),
    "resize": (lambda: AugmentConfig(resize="quick"), ("resize quick is unknown", "exact, fast")),
    "optimizer": (lambda: OptimConfig(optimizer="adam"), ("optimizer adam is unknown", "adamw, lars")),
    "schedule": (lambda: OptimConfig(schedule="linear"), ("schedule linear is unknown", "cosine, constant")),
    "engine": (lambda: PretrainConfig(engine="ddp"), ("engine ddp is unknown", "pmap, jit, fsdp")),
    "crops": (lambda: FinetuneConfig(crops="gpu"), ("crops gpu is unknown", "host, device")),
    "pooling of a run": (lambda: FinetuneConfig(pooling="max"), ("pooling max is unknown",)),
    "cudnn's heads": (
        lambda: ModelConfig(attention="cudnn", dtype="bfloat16", decoder=TransformerConfig(64, 1, 16)),
        ("attention cudnn", "decoder.heads is 4"),
    ),
    "keeps none": (lambda: ModelConfig(mask_ratio=0.999), ("mask_ratio 0.999", "keeps none", "196 patches")),
    "hides none": (lambda: ModelConfig(mask_ratio=0.0), ("mask_ratio 0.0", "hides none", "196 patches")),
    "negative ratio": (lambda: ModelConfig(mask_ratio=-0.5), ("mask_ratio -0.5", "hides none", "196 patches")),
    "ratio not a number": (lambda: ModelConfig(mask_ratio=float("nan")), ("mask_ratio nan", "196 patches")),
    "one patch": (lambda: ModelConfig(image_size=16, mask_ratio=0.5), ("mask_ratio 0.5", "the 1 patches")),
    "sincos2d, encoder": (
        lambda: ModelConfig(encoder=TransformerConfig(30, 1, 3)),
        ("encoder.width 30", "divisible by 4", "positions sincos2d"),
    ),
    "sincos2d, decoder": (
        lambda: ModelConfig(decoder=TransformerConfig(30, 1, 3)),
        ("decoder.width 30", "divisible by 4", "positions sincos2d"),
    ),
    "sincos1d": (
        lambda: ModelConfig(decoder=TransformerConfig(15, 1, 3), positions="sincos1d"),
        ("decoder.width 15", "divisible by 2", "positions sincos1d"),
    ),
    "normalising one value": (
        lambda: ModelConfig(image_size=8, patch_size=1, in_channels=1, norm_pix_loss=True),
        ("norm_pix_loss", "patch_size 1"),
    ),
    "components of normalised patches": (
        lambda: ModelConfig(norm_pix_loss=True, pca_components=96),
        ("pca_components 96", "norm_pix_loss False"),
    ),
    "no component": (lambda: ModelConfig(pca_components=0), ("pca_components 0", "1 or more")),
    "more components than values": (
        lambda: ModelConfig(pca_components=769),
        ("pca_components 769", "768 values", "patch_size 16", "in_channels 3"),
    ),
    "block on few patches": (
        lambda: ModelConfig(image_size=(16, 48), masking="block", mask_ratio=0.5),
        ("masking block", "3"),
    ),
    "grid and ratio": (
        lambda: ModelConfig(masking="grid", mask_ratio=0.6),
        ("mask_ratio 0.6", "masking grid", "14 x 14 patches"),
    ),
    "grid that does not divide": (
        lambda: ModelConfig(image_size=(48, 64), masking="grid"),
        ("mask_ratio 0.75", "masking grid", "3 x 4 patches"),
    ),
    "area of crops": (lambda: AugmentConfig(scale=(0.5, 1.5)), ("scale (0.5, 1.5)",)),
    "aspect of crops": (lambda: AugmentConfig(ratio=(2.0, 1.0)), ("ratio (2.0, 1.0)",)),
    "jitter": (lambda: AugmentConfig(color_jitter=-0.4), ("color_jitter -0.4",)),
    "magnitude": (lambda: AugmentConfig(rand_augment=11.0), ("rand_augment 11.0", "0 .. 10")),
    "spread of magnitudes": (lambda: AugmentConfig(rand_augment_std=math.inf), ("rand_augment_std inf",)),
    "evaluation of nothing": (lambda: AugmentConfig(evaluation_crop=0.0), ("evaluation_crop 0.0",)),
    "evaluation of more": (lambda: AugmentConfig(evaluation_crop=1.1), ("evaluation_crop 1.1",)),
    "jitter on the device": (
        lambda: PretrainConfig(crops="device", augment=AugmentConfig(color_jitter=0.4)),
        ('crops "device"', "augment.color_jitter 0.4"),
    ),
    "RandAugment on the device": (
        lambda: PretrainConfig(crops="device", augment=AugmentConfig(rand_augment=9.0)),
        ('crops "device"', "augment.rand_augment 9.0"),
    ),
    "mean and std": (
        lambda: AugmentConfig(mean=(0.5,), std=(0.5, 0.25)),
        ("mean (0.5,)", "std (0.5, 0.25)"),
    ),
    "std of nothing": (lambda: AugmentConfig(mean=(0.5,), std=(0.0,)), ("std (0.0,)",)),
    "rate": (lambda: OptimConfig(base_lr=0.0), ("base_lr 0.0",)),
    "momentum": (lambda: OptimConfig(beta2=1.0), ("beta2 1.0",)),
    "decay": (lambda: OptimConfig(weight_decay=-0.1), ("weight_decay -0.1",)),
    "clipping": (lambda: OptimConfig(clip_norm=0.0), ("clip_norm 0.0",)),
    "average": (lambda: OptimConfig(ema_decay=1.0), ("ema_decay 1.0",)),
    "accumulation": (
        lambda: PretrainConfig(batch_size=256, accumulate=3),
        ("batch_size 256", "accumulate 3"),
    ),
    "channels": (
        lambda: PretrainConfig(model=ONE_CHANNEL),
        ("augment.mean (0.485, 0.456, 0.406)", "3 values", "model.in_channels is 1"),
    ),
    "seed": (lambda: PretrainConfig(seed=2**32), ("seed 4294967296",)),
    "steps": (lambda: PretrainConfig(steps=0), ("steps 0",)),
    "workers": (lambda: PretrainConfig(workers=-1), ("workers -1",)),
    "fsdp": (lambda: PretrainConfig(fsdp=2), ("fsdp 2", "engine fsdp", "pmap")),
    "hosts": (lambda: PretrainConfig(num_processes=2), ("num_processes 2", "coordinator", "process_id")),
    "process_id": (
        lambda: PretrainConfig(coordinator="a:1", process_id=2, num_processes=2),
        ("process_id 2", "num_processes 2"),
    ),
    "coordinator": (
        lambda: PretrainConfig(coordinator="a", process_id=0, num_processes=2),
        ("coordinator a", "HOST:PORT"),
    ),
    "blocks": (lambda: FinetuneConfig(last_blocks=13), ("last_blocks 13", "0 .. 12")),
    "sweep": (lambda: FinetuneConfig(sweep=(0.1, 0.2)), ("sweep (0.1, 0.2)", "last_blocks 0")),
    "equal rates": (lambda: FinetuneConfig(last_blocks=0, sweep=(0.1, 0.1)), ("sweep (0.1, 0.1)", "different")),
    "layer decay": (lambda: FinetuneConfig(layer_decay=1.1), ("layer_decay 1.1",)),
    "batch norm": (
        lambda: FinetuneConfig(last_blocks=0, batch_norm=True, accumulate=2),
        ("batch_norm", "accumulate 2"),
    ),
    "holdout": (lambda: FinetuneConfig(holdout=1), ("holdout 1",)),
    "evaluations": (lambda: FinetuneConfig(evaluate_every=0.0), ("evaluate_every 0.0",)),
    "mixed repeats": (lambda: FinetuneConfig(mix=MixConfig(mixup=0.8), repeats=2), ("mixup", "repeats 2")),
    "mixup": (lambda: MixConfig(mixup=-1.0), ("mixup -1.0",)),
    "erasing": (lambda: MixConfig(erase=1.5), ("erase 1.5",)),
    "smoothing": (lambda: MixConfig(smoothing=1.0), ("smoothing 1.0",)),
    "drop path": (lambda: ClassifierConfig(drop_path=1.0), ("drop_path 1.0",)),
    "trust": (lambda: OptimConfig(trust=0.0), ("trust 0.0",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_fields_and_values(name):
    build, words = REFUSED[name]
    with pytest.raises(ValueError, match=r".") as refused:
        build()
    missing = [word for word in words if word not in str(refused.value)]
    assert missing == [], refused.value


def model(image_hw, patch_hw, **changes):
    return ModelConfig(image_size=image_hw, patch_size=patch_hw, encoder=NARROW, decoder=NARROW, **changes)


sides = st.integers(1, 12)


@given(rows=sides, columns=sides, patch=st.tuples(sides, sides), ratio=st.floats(0, 1))
def test_the_count_of_visible_patches(rows, columns, patch, ratio):
    length = rows * columns
    keep = int(np.float64(length) * (np.float64(1) - np.float64(ratio)))
    image = (rows * patch[0], columns * patch[1])
    if 1 <= keep <= length - 1:
        config = model(image, patch, mask_ratio=ratio)
        assert (config.grid, config.num_patches, config.keep) == ((rows, columns), length, keep)
        assert config.patch_dim == patch[0] * patch[1] * 3
    else:
        with pytest.raises(ValueError, match=rf"mask_ratio {ratio} (keeps|hides) none of the {length} patches"):
            model(image, patch, mask_ratio=ratio)


def test_the_count_is_cut_off_and_not_rounded():
    # 1 - 0.9 is 0.09999999999999998 in float64, so ten patches keep none: the authors' own count.
    assert model((32, 32), 4, mask_ratio=0.77).keep == 14  # 14.72
    with pytest.raises(ValueError, match="keeps none"):
        model((4, 40), 4, mask_ratio=0.9)


@given(image=st.tuples(st.integers(1, 40), st.integers(1, 40)), patch=st.tuples(sides, sides))
def test_only_patches_that_tile_the_image_are_accepted(image, patch):
    tiles = image[0] % patch[0] == 0 and image[1] % patch[1] == 0
    enough = (image[0] // patch[0]) * (image[1] // patch[1]) >= 2
    built = None
    with suppress(ValueError):
        built = model(image, patch, mask_ratio=0.5)
    assert (built is not None) == (tiles and enough)


@given(image=st.integers(1, 3000), patch=st.integers(1, 4000))
def test_the_patches_that_a_refusal_names_are_the_nearest_that_divide(image, patch):
    assume(image % patch)
    nearest = sorted((p for p in range(1, image + 1) if image % p == 0), key=lambda p: abs(p - patch))[:2]
    with pytest.raises(ValueError, match=rf"nearest that divide {image}: {', '.join(map(str, sorted(nearest)))}\)"):
        ModelConfig(image_size=image, patch_size=patch)


@given(stride=st.integers(2, 5), rows=st.integers(1, 4), columns=st.integers(1, 4))
def test_grid_masks_keep_one_patch_of_every_cell(stride, rows, columns):
    image = (rows * stride * 2, columns * stride * 2)
    config = model(image, 2, masking="grid", mask_ratio=1 - 1 / stride**2)
    assert (config.grid_stride, config.keep) == (stride, rows * columns)


@given(width=st.integers(1, 64), heads=st.integers(1, 16))
def test_widths_are_cut_into_equal_heads(width, heads):
    if width % heads == 0:
        assert TransformerConfig(width, 1, heads).head_dim * heads == width
    else:
        with pytest.raises(ValueError, match=f"width {width} .* heads {heads}$"):
            TransformerConfig(width, 1, heads)


def test_sides_may_be_given_once_or_twice():
    once, twice = model(32, 4), model((32, 32), (4, 4))
    assert once.image_hw == twice.image_hw == (32, 32)
    assert once.patch_hw == twice.patch_hw == (4, 4)


# Width, depth, heads, width of a head, patches, visible ones.
SIZES = {
    "vit_tiny_patch16": (192, 12, 3, 64, 196, 49),
    "vit_small_patch16": (384, 12, 6, 64, 196, 49),
    "vit_base_patch16": (768, 12, 12, 64, 196, 49),
    "vit_large_patch16": (1024, 24, 16, 64, 196, 49),
    "vit_huge_patch14": (1280, 32, 16, 80, 256, 64),
}


def test_the_sizes_are_the_papers():
    found = {
        name: (c.encoder.width, c.encoder.depth, c.encoder.heads, c.encoder.head_dim, c.num_patches, c.keep)
        for name, c in MODELS.items()
    }
    assert found == SIZES
    assert {c.decoder for c in MODELS.values()} == {TransformerConfig(width=512, depth=8, heads=16, mlp_ratio=4.0)}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds_and_has_a_work_directory_of_its_own(name):
    config = PRESETS[name]()
    assert isinstance(config, PretrainConfig)
    assert [other for other in PRESETS if PRESETS[other]().workdir == config.workdir] == [name]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: OptimConfig(base_lr=math.inf), "base_lr inf must be positive and finite"),
        (lambda: OptimConfig(warmup_epochs=math.inf), "warmup_epochs inf must be finite"),
        (lambda: AugmentConfig(mean=(math.nan,) * 3), "mean .* must be finite"),
        (lambda: TransformerConfig(8, 2.5, 2), "depth 2.5 must be a whole number"),
        (lambda: ModelConfig(image_size=(32, 32, 32)), r"\(32, 32, 32\) is not a side, nor height and width"),
        (
            lambda: PretrainConfig(keep_every=1500, save_every=1000),
            "keep_every 1500 is not a multiple of save_every 1000",
        ),
        (lambda: ClassifierConfig(ModelConfig(class_token=False), 10, "class"), "pooling class needs a class token"),
        (lambda: ClassifierConfig(classes=0), "classes 0"),
        (lambda: PretrainConfig(workdir=""), 'workdir "" is empty: name the folder'),
    ],
)
def test_nonsense_is_refused_by_name(build, words):
    with pytest.raises(ValueError, match=words):
        build()


OPERATION = {
    "coordinator", "process_id", "workers",
    "workdir", "engine", "devices", "fsdp", "num_processes", "log_every", "save_every", "keep", "keep_every",
}  # fmt: skip
MAY_DIFFER = {PretrainConfig: OPERATION | {"reconstruct_every"}, FinetuneConfig: OPERATION}


@pytest.mark.parametrize("kind", MAY_DIFFER)
def test_what_may_differ_when_a_run_continues(kind):
    """Fields of operation, and those alone; a host may have the first three for itself."""
    assert {field.name for field in dataclasses.fields(kind.operation)} == MAY_DIFFER[kind]
    assert {field.name for field in dataclasses.fields(HostConfig)} == {"coordinator", "process_id", "workers"}


def changed_once(config):
    """Every field, nested ones included, and a copy in which it alone has another value, which nothing checks."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        inner = changed_once(value) if dataclasses.is_dataclass(value) else [("", "another")]
        for name, other in inner:
            changed = copy.copy(config)
            object.__setattr__(changed, field.name, other)
            yield f"{field.name}.{name}".removesuffix("."), changed


@pytest.mark.parametrize("kind", MAY_DIFFER)
def test_every_other_field_is_compared(kind):
    for name, changed in changed_once(kind()):
        found = [key for key, _, _ in differences(kind(), changed)]
        assert found == ([] if name in MAY_DIFFER[kind] else [name])


@pytest.mark.parametrize("kind", MAY_DIFFER)
def test_the_file_of_a_run_has_its_kind(kind):
    assert config_to_dict(kind())["kind"] == kind.kind
