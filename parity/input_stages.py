"""What the models are fed with: from a file to a batch of pretraining or fine-tuning, in the order of the data.

The reference draws and computes its inputs itself (torch_inputs.py). Stages here do not depend on the model that is
compared: pictures are tiny, and every choice of crops and mixing is tried, at two seeds and at the ends of the stream.
"""

import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import torch
from PIL import Image

from mae_jax import rng
from mae_jax.config import AugmentConfig, FinetuneConfig, MixConfig, ModelConfig, PretrainConfig, TransformerConfig
from mae_jax.data import stream
from mae_jax.data.images import box as choice
from mae_jax.data.images import decode
from mae_jax.train import classification, crops, objective
from mae_jax.train import mixing as mixing_code
from parity import torch_inputs
from parity.bounds import Pair, Pairs
from parity.sides import Ours, Reference

CLASSES = 5
LAST_SEED = 2**32 - 1
POSITIONS = np.array([0, 1, 2, 3, 4, 5, rng.MAX_POSITION - 1, rng.MAX_POSITION], np.uint32)
# 8/7 of its sides are no whole numbers, and are rounded up.
MODEL = ModelConfig((32, 20), (8, 4), 3, TransformerConfig(8, 2, 1), TransformerConfig(8, 1, 1))
AUGMENT = AugmentConfig(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))

# Of the bytes of a crop cut on the device, the share that may be one step from Pillow's, which multiplies by weights in
# whole units of 2^-22: a sum that falls between two bytes is rounded either way. Of 12 runs the most were 3 in 10,000.
ROUNDED_OTHERWISE = 0.002


class Pictures:
    """Files in memory as a source of images; the class of each is its number."""

    in_memory = True
    class_names: tuple[str, ...] = ()

    def __init__(self, files: list[bytes]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return f"picture {index}"

    def label(self, index: int) -> int:
        return index

    def file(self, index: int) -> bytes:
        return self.files[index]

    def picture(self, index: int) -> decode.Picture:
        return decode.open_picture(self.files[index], "RGB", self.name(index))

    def load(self, index: int) -> Image.Image:
        return self.picture(index).image()


def draw_pictures(seed: int) -> Pictures:
    """Draw rough pictures of several sizes and shapes: PNG and JPEG, in colour and in grey, one lying on its side."""
    generator = np.random.default_rng(seed)
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: to be turned by a quarter
    files = []
    for (height, width), mode, options in (
        ((40, 53), "RGB", {"format": "JPEG"}),
        ((70, 31), "RGB", {"format": "PNG"}),
        ((33, 90), "L", {"format": "JPEG"}),
        ((24, 24), "L", {"format": "PNG"}),
        ((48, 80), "RGB", {"format": "JPEG", "exif": turned}),
        ((120, 20), "RGB", {"format": "PNG"}),
    ):
        pixels = generator.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST).convert(mode).save(file, **options)
        files.append(file.getvalue())
    return Pictures(files)


def pretraining(reference: Reference, **changes: Any) -> PretrainConfig:
    """Configure a run of tiny images at the reference's precision and seed."""
    config = PretrainConfig(
        model=replace(MODEL, dtype=reference.precision),
        augment=AUGMENT,
        batch_size=4,
        workers=0,
        seed=reference.run_config.seed,
    )
    return replace(config, **changes)


def finetuning(reference: Reference, mix: MixConfig, **changes: Any) -> FinetuneConfig:
    """Configure fine-tuning on tiny images at the reference's precision and seed."""
    config = FinetuneConfig(
        model=replace(MODEL, dtype=reference.precision),
        augment=AUGMENT,
        batch_size=len(POSITIONS),
        classes=len(POSITIONS),
        seed=reference.run_config.seed,
        mix=mix,
    )
    return replace(config, **changes)


def seeds(reference: Reference) -> tuple[int, int]:
    """Return the run's own seed, and the largest that there is."""
    return reference.run_config.seed, LAST_SEED


def read(source: Pictures, config: PretrainConfig, start_step: int, steps: int) -> stream.TrainingBatch:
    """Read some steps of the stream as one batch."""
    with stream.training_batches(source, config, start_step=start_step, stop_step=start_step + steps) as batches:
        found = list(batches)
    joined = {key: np.concatenate([cast(dict, batch)[key] for batch in found]) for key in found[0]}
    return cast(stream.TrainingBatch, joined)


# --- from files to bytes --------------------------------------------------------------------------------------------


def order(ours: Ours, reference: Reference) -> Pairs:
    """Compare which image each position shows, in the first epochs and at the end of the stream, with repeats."""
    source = draw_pictures(reference.run_config.seed)
    for seed in seeds(reference):
        for repeats in (1, 2):
            config = pretraining(reference, seed=seed, repeats=repeats)
            for start in (0, rng.MAX_POSITION // config.batch_size - 4):
                batch = read(source, config, start, 4)
                positions = start * config.batch_size + np.arange(4 * config.batch_size)
                theirs = torch_inputs.order(len(source), seed, positions, repeats)
                what = f"seed {seed}, {repeats} in a row, step {start}"
                yield Pair("order", f"positions, {what}", batch["position"], positions, "exact")
                yield Pair("order", f"images, {what}", batch["label"], theirs, "exact")


def decoding(ours: Ours, reference: Reference) -> Pairs:
    """Compare decoded files, in colour and in grey."""
    for index, file in enumerate(draw_pictures(reference.run_config.seed).files):
        for channels, mode in {1: "L", 3: "RGB"}.items():
            theirs = np.asarray(torch_inputs.decode(file, channels))
            pixels = decode.open_picture(file, mode).pixels().reshape(theirs.shape)
            yield Pair("decoding", f"picture {index}, {mode}", pixels, theirs, "exact")


def boxes(ours: Ours, reference: Reference) -> Pairs:
    """Compare the part that a position shows, and whether it is mirrored."""
    sizes = [(40, 53), (70, 31), (33, 90), (500, 375), (120, 2), (3, 120)]
    for crop in ("random", "fixed", "center"):
        for seed in seeds(reference):
            config = pretraining(reference, seed=seed, augment=replace(AUGMENT, crop=crop))
            draw = partial(rng.host_generator, seed)
            drawn, theirs = [], []
            for position in POSITIONS.tolist():
                for size in sizes:
                    generator = draw("crop", position)
                    drawn.append(choice.choose_box(size, config.augment, config.model.image_hw, generator))
                    theirs.append(torch_inputs.crop_box(size, config, position))
            yield Pair("boxes", f"{crop}, seed {seed}", np.array(drawn), np.array(theirs), "exact")
            if crop == "random":
                mirrored = [choice.flips(config.augment, draw("flip", position)) for position in range(64)]
                expected = [torch_inputs.flipped(config, position) for position in range(64)]
                yield Pair("boxes", f"mirrored, seed {seed}", mirrored, expected, "exact")


def host_crops(ours: Ours, reference: Reference) -> Pairs:
    """Compare the bytes of batches that the host cuts, with every kind of crop."""
    source = draw_pictures(reference.run_config.seed)
    others = replace(AUGMENT, flip=False), replace(AUGMENT, crop="fixed"), replace(AUGMENT, crop="center")
    for augment in (AUGMENT, *others):
        for seed in seeds(reference):
            config = pretraining(reference, seed=seed, augment=augment)
            batch = read(source, config, 0, 3)
            shown = zip(batch["label"].tolist(), batch["position"].tolist(), strict=True)
            theirs = [torch_inputs.host_crop(source.files[image], config, position) for image, position in shown]
            what = f"{augment.crop}, {'flips' if augment.flip else 'no flips'}, seed {seed}"
            yield Pair("crops on the host", what, batch["image"], np.stack(theirs), "exact")


def device_crops(ours: Ours, reference: Reference) -> Pairs:
    """Compare squeezed pictures and boxes as they are sent, and the crops that the device cuts out of them."""
    source = draw_pictures(reference.run_config.seed)
    cut = jax.jit(partial(crops.crop_images, image_hw=MODEL.image_hw))
    for crop in ("random", "fixed", "center"):
        for seed in seeds(reference):
            config = pretraining(reference, crops="device", seed=seed, augment=replace(AUGMENT, crop=crop))
            batch = read(source, config, 0, 3)
            shown = zip(batch["label"].tolist(), batch["position"].tolist(), strict=True)
            theirs = [torch_inputs.canvas(source.files[image], config, position) for image, position in shown]
            what = f"{crop}, seed {seed}"
            squares, sent = np.stack([square for square, _, _ in theirs]), [[*box, flip] for _, box, flip in theirs]
            yield Pair("crops on the device", f"squares, {what}", batch["image"], squares, "exact")
            yield Pair("crops on the device", f"boxes, {what}", batch["crop"], np.array(sent), "exact")
            pixels = np.asarray(cut(squares, np.array(sent, np.float32))).astype(int)
            expected = np.stack([torch_inputs.device_crop(*row, config.model.image_hw) for row in theirs])
            steps = np.abs(pixels - expected)
            agree = np.array([steps.max() <= 1, (steps > 0).mean() < ROUNDED_OTHERWISE])
            yield Pair("crops on the device", f"pixels, {what}", agree, np.ones(2, bool), "exact")


# --- from bytes to what a model is fed with -------------------------------------------------------------------------


def pretraining_inputs(ours: Ours, reference: Reference) -> Pairs:
    """Compare normalised images, and the noise of masks at both ends of the stream."""
    generator = np.random.default_rng(reference.run_config.seed)
    images = generator.integers(0, 256, (len(POSITIONS), *MODEL.image_hw, 3), dtype=np.uint8)
    for seed in seeds(reference):
        config = pretraining(reference, seed=seed)
        batch = objective.Batch(images, POSITIONS)
        prepare = jax.jit(partial(objective.Pretraining(config).inputs, step=jnp.zeros((), jnp.int32)))
        normalised, noise = prepare(batch, jnp.asarray(images))
        theirs, their_noise = torch_inputs.pretraining_inputs(config, images, POSITIONS)
        yield Pair("pretraining inputs", f"images, seed {seed}", normalised, theirs.movedim(1, -1), "stage")
        yield Pair("pretraining inputs", f"noise, seed {seed}", noise, their_noise, "exact")


Prepare = Callable[[np.ndarray, np.ndarray, int], classification.Examples]


def prepared(config: FinetuneConfig) -> Prepare:
    """Return what prepares a batch of fine-tuning at `POSITIONS`: images as bytes, labels and the step."""
    task = classification.Classification(config)

    def prepare(images: np.ndarray, labels: np.ndarray, step: int) -> classification.Examples:
        return task.inputs(
            objective.Batch(images, POSITIONS, labels=labels), jnp.asarray(images), jnp.asarray(step, jnp.int32)
        )

    return prepare


def compiled(config: FinetuneConfig) -> Prepare:
    """Compile it as one program, with few optimisations: seconds less, and the same draws."""
    return jax.jit(prepared(config), compiler_options={"xla_backend_optimization_level": 0})


def erasing(ours: Ours, reference: Reference) -> Pairs:
    """Compare which rectangle of each image is erased, and the noise that comes there."""
    grey = np.full((len(POSITIONS), *MODEL.image_hw, 3), 128, np.uint8)
    labels = np.zeros(len(POSITIONS), np.int32)
    for chance, seed in ((0.0, reference.run_config.seed), (0.5, LAST_SEED), (1.0, reference.run_config.seed)):
        config = finetuning(reference, MixConfig(erase=chance), seed=seed)
        made = np.asarray(compiled(config)(grey, labels, 0).images)
        plain = torch_inputs.normalise(grey, config.augment, getattr(torch, reference.precision))
        erased = [
            torch_inputs.erased(seed, position, chance, MODEL.image_hw, reference.precision)[0]
            for position in POSITIONS.tolist()
        ]
        marks = [np.zeros(MODEL.image_hw, bool) if box is None else box.marked(*MODEL.image_hw) for box in erased]
        theirs = torch_inputs.erase(plain, seed, POSITIONS, chance)
        what = f"chance {chance}, seed {seed}"
        touched = np.abs(made - plain.movedim(1, -1).numpy()).max(axis=-1) > 1e-5
        yield Pair("erasing", f"rectangles, {what}", touched, np.stack(marks), "exact")
        yield Pair("erasing", f"images, {what}", made, theirs.movedim(1, -1), "normal")


def narrow_erasing(ours: Ours, reference: Reference) -> Pairs:
    """Compare what is erased of images so low that often no rectangle of those drawn fits."""
    size, seed = (3, 40), 0
    images = torch.zeros(len(POSITIONS), 1, *size, dtype=getattr(torch, reference.precision))
    theirs = torch_inputs.erase(images, seed, POSITIONS, 1.0)
    made = mixing_code.erase(
        jnp.asarray(images.movedim(1, -1).numpy()), rng.device_key(seed, "erase"), jnp.asarray(POSITIONS), 1.0
    )
    touched = (np.asarray(made) != 0, theirs.movedim(1, -1).numpy() != 0)
    yield Pair("erasing", "rectangles in low images", *touched, "exact")
    none = sum(not rows.any() for rows in touched[1])
    yield Pair("erasing", "some low images stay whole", 0 < none < len(POSITIONS), True, "exact")


# Every choice between the two ways to mix, and how many steps show it.
MIXES = {
    "mixup": (MixConfig(mixup=0.8), 2),
    "cutmix": (MixConfig(cutmix=0.7), 2),
    "both, cutmix never": (MixConfig(mixup=0.8, cutmix=0.3, cutmix_share=0.0), 1),
    "both, cutmix always": (MixConfig(mixup=0.3, cutmix=0.8, cutmix_share=1.0), 1),
    "both": (MixConfig(mixup=0.8, cutmix=1.0), 3),
}


def mixing(ours: Ours, reference: Reference) -> Pairs:
    """Compare how a batch is mixed: which of the two ways, the share, the box, with whom, and the targets.

    Images are black and white in turn and every row has a class of its own, so that what was drawn shows in the result:
    a row of black ones is grey all over after mixup, and has a white box after cutmix.
    """
    rows = np.arange(len(POSITIONS), dtype=np.int32)
    images = np.broadcast_to((255 * (rows % 2)).astype(np.uint8)[:, None, None, None], (len(rows), *MODEL.image_hw, 3))
    plain = replace(AUGMENT, mean=(0.0,) * 3, std=(1.0,) * 3)
    for number, (name, (mix, steps)) in enumerate(MIXES.items()):
        config = finetuning(reference, mix, augment=plain, seed=seeds(reference)[number % 2])
        prepare = prepared(config)  # one operation at a time, each of which is compiled once for all choices
        for step in range(steps):
            made = prepare(images, rows, step)
            first, targets = np.asarray(made.images)[0, :, :, 0], np.asarray(made.targets)
            drawn = torch_inputs.mixing(mix, config.seed, step, reference.precision)
            assert drawn is not None
            _, their_targets, _ = torch_inputs.classification_inputs(config, images, rows, POSITIONS, step)
            what = f"{name}, step {step}"
            cut = bool(np.isin(first, (0, 1)).all())
            yield Pair("mixing", f"whether by a box, {what}", cut, drawn.kind == "cutmix", "exact")
            if drawn.kind == "cutmix":
                box = torch_inputs.cutmix_box(drawn.share, drawn.centre, *MODEL.image_hw).marked(*MODEL.image_hw)
                yield Pair("mixing", f"box, {what}", first, box, "exact")
            else:
                shares = np.full_like(first, 1 - drawn.share)
                yield Pair("mixing", f"share, {what}", first, shares, "stage")
            yield Pair("mixing", f"with whom, {what}", targets > 0, their_targets > 0, "exact")
            yield Pair("mixing", f"targets, {what}", targets, their_targets, "stage")


def classification_inputs(ours: Ours, reference: Reference) -> Pairs:
    """Compare whole batches of fine-tuning, with everything on: images, targets, and the uniforms of drop path."""
    generator = np.random.default_rng(reference.run_config.seed)
    images = generator.integers(0, 256, (len(POSITIONS), *MODEL.image_hw, 3), dtype=np.uint8)
    labels = generator.integers(0, CLASSES, len(POSITIONS)).astype(np.int32)
    mix = MixConfig(smoothing=0.1, mixup=0.8, cutmix=1.0, erase=0.5)
    config = finetuning(reference, mix, classes=CLASSES)
    prepare = compiled(config)
    for step in range(4):
        made = prepare(images, labels, step)
        theirs, targets, uniforms = torch_inputs.classification_inputs(config, images, labels, POSITIONS, step)
        stage = "classification inputs"
        yield Pair(stage, f"images, step {step}", made.images, theirs.movedim(1, -1), "normal")
        yield Pair(stage, f"targets, step {step}", made.targets, targets, "stage")
        if step == 0:
            yield Pair(stage, "drop path's uniforms", made.uniforms, uniforms, "exact")


INPUTS = (
    order,
    decoding,
    boxes,
    host_crops,
    device_crops,
    pretraining_inputs,
    erasing,
    narrow_erasing,
    mixing,
    classification_inputs,
)
