"""Scores of a classifier, its confusion matrix, and the images that it predicts worst."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from mae_jax.config import AugmentConfig, ClassifierConfig, FinetuneConfig, wide
from mae_jax.data.evaluation import evaluation_batches, load_samples
from mae_jax.data.sources.source import Source
from mae_jax.data.sources.split import Subset
from mae_jax.errors import StatedError
from mae_jax.files import save_picture
from mae_jax.hosts import Hosts
from mae_jax.models import Params
from mae_jax.models.classifier import Classifier, Pooled
from mae_jax.train.classification import fold_batch_norm, head_logits
from mae_jax.train.objective import normalise_images

_MOST = 256  # images a device at once


class Outcomes(NamedTuple):
    """What each head predicts of each image; images that do not decode or have no class are left out.

    rank: classes that were given a higher score than the true one.
    """

    rank: Int[np.ndarray, "heads images"]
    predicted: Int[np.ndarray, "heads images"]
    loss: Float[np.ndarray, "heads images"]
    label: Int[np.ndarray, " images"]  # the true class
    image: Int[np.ndarray, " images"]  # its number in the source
    left_out: int

    def top(self, count: int) -> Float[np.ndarray, " heads"]:
        """Return the share of the images whose true class is among the `count` with the highest scores."""
        return (self.rank < count).mean(axis=1)


@partial(jax.jit, static_argnames=("config", "augment"))
def _evaluate_batch(
    params: Params,
    images: UInt8[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
    config: ClassifierConfig,
    augment: AugmentConfig,
) -> tuple[Int[Array, "heads batch"], Int[Array, "heads batch"], Float[Array, "heads batch"]]:
    """Compute rank, predicted class and loss."""
    params = fold_batch_norm(params)
    pixels = normalise_images(images, augment, wide(config.model.dtype))
    pooled = cast(Pooled, Classifier(config).apply({"params": params}, pixels, method="pool"))
    logits = head_logits(params["head"], pooled)
    logits = logits.reshape(-1, *logits.shape[-2:])  # a single head has no axis of heads
    truth = jnp.take_along_axis(logits, labels[None, :, None], axis=-1)
    # Of equal scores the class that comes first counts as higher, as in argmax: else a head of zeros would be right
    # about every image. A comparison with nan is false, which would be rank 0, so nan gets the worst rank there is.
    before = jnp.arange(logits.shape[-1]) < labels[:, None]
    rank = ((logits > truth) | ((logits == truth) & before)).sum(axis=-1)
    rank = jnp.where(jnp.isfinite(logits).all(axis=-1), rank, logits.shape[-1])
    loss = jax.nn.logsumexp(logits, axis=-1) - truth[..., 0]
    return rank, logits.argmax(axis=-1), loss


def _gather(values: jax.Array) -> np.ndarray:
    """Fetch an array whole, on several hosts from all of them."""
    return np.asarray(values if values.is_fully_addressable else multihost_utils.process_allgather(values, tiled=True))


def evaluate_classifier(
    params: Params,
    source: Source,
    config: FinetuneConfig,
    put_rows: Callable[[Any], Any],
    devices: int,
    hosts: Hosts,
) -> Outcomes:
    """Evaluate a classifier on centre crops of every image of a source; on several hosts each reads its own share.

    put_rows: cuts arrays of this host along their first axis over all devices, of which there are `devices`
      (`Engine.put_rows`).

    Raises:
      StatedError: no image decodes and has a class.
    """
    # All hosts together take `batch` rows at a time, a multiple of the devices, so that one program is compiled; host
    # 0 has the first rows of each batch. The last batch is filled up with the last image, whose label is then -1.
    batch = -(-min(_MOST * devices, len(source)) // devices) * devices
    own, count = batch // hosts.count, -(-len(source) // batch)
    indices = np.array([first * batch + hosts.index * own + row for first in range(count) for row in range(own)])
    share = Subset(source, np.minimum(indices, len(source) - 1).tolist())
    model = config.model
    found: list[tuple[np.ndarray, ...]] = []
    crop, workers = config.augment.evaluation_crop, config.workers
    read = evaluation_batches(share, model.image_hw, model.in_channels, own, share=crop, workers=workers)
    with read as batches:
        for number, rows in enumerate(batches):
            # Rows of images that do not decode are missing here, and stay black with label -1: hosts must agree on the
            # shape of a batch whatever they could read.
            images = np.zeros((own, *model.image_hw, model.in_channels), np.uint8)
            labels = np.full(own, -1, np.int32)
            at = rows["index"] - number * own
            images[at], labels[at] = rows["image"], rows["label"]
            index = indices[number * own : (number + 1) * own]
            labels[index >= len(source)] = -1
            images, labels, index = put_rows((images, labels, index.astype(np.int32)))
            scores = _evaluate_batch(params, images, jnp.maximum(labels, 0), config.classifier, config.augment)
            found.append(tuple(map(_gather, (*scores, labels, index))))
    rank, predicted, loss, label, index = (np.concatenate(parts, axis=-1) for parts in zip(*found, strict=True))
    known = label >= 0
    if not known.any():
        raise StatedError(
            f"data: none of the {len(source):,} images to evaluate on decodes and has a class", field="data"
        )
    left_out = len(source) - int(known.sum())
    return Outcomes(rank[:, known], predicted[:, known], loss[:, known], label[known], index[known], left_out)


CONFUSION, WORST = "confusion.png", "worst.png"
_LABELLED = 50  # classes, at most, whose names fit beside a matrix
_COUNTED = 20  # classes, at most, whose counts fit into it


def confusion_matrix(outcomes: Outcomes, head: int, classes: int) -> Int[np.ndarray, "classes classes"]:
    """Count the images of each true class (rows) by their predicted class (columns)."""
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (outcomes.label, outcomes.predicted[head]), 1)
    return matrix


def draw_confusion(matrix: Int[np.ndarray, "classes classes"], names: tuple[str, ...], title: str) -> Image.Image:
    """Draw a confusion matrix, each row as shares of its class."""
    classes = len(matrix)
    side = min(14.0, 3 + 0.45 * classes)
    figure = Figure(figsize=(side, side), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    # Colour by the share of the true class, so that rare classes are as visible as frequent ones; numbers are counts.
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(title=title, xlabel="predicted class", ylabel="true class")
    if classes <= _LABELLED:
        axes.set_xticks(range(classes), names, rotation=90, fontsize=8)
        axes.set_yticks(range(classes), names, fontsize=8)
    if classes <= _COUNTED:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=colour)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def draw_worst(outcomes: Outcomes, head: int, source: Source, config: FinetuneConfig, count: int = 32) -> Image.Image:
    """Draw the images with the largest losses, the largest first.

    Below each: its true class with the probability that it was given, and the predicted class, red where it is wrong.
    """
    image_hw, share, names = config.model.image_hw, config.augment.evaluation_crop, source.class_names
    # A cell is an image, enlarged in whole steps, with 40 pixels below it for two lines of 20 letters.
    order = np.argsort(-outcomes.loss[head], kind="stable")[:count]
    scale = max(1, 96 // max(image_hw))
    height, width = image_hw[0] * scale, max(image_hw[1] * scale, 120)
    columns, font = min(8, len(order)), ImageFont.load_default(size=12)
    rows = -(-len(order) // columns)
    sheet = Image.new("RGB", (columns * (width + 6) + 6, rows * (height + 40) + 6), "white")
    pen = ImageDraw.Draw(sheet)
    for cell, row in enumerate(order):
        left, top = 6 + cell % columns * (width + 6), 6 + cell // columns * (height + 40)
        pixels = load_samples(source, [int(outcomes.image[row])], 1, image_hw, share)[0]
        shown = Image.fromarray(pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., 0])
        sheet.paste(shown.resize((image_hw[1] * scale, height), Image.Resampling.NEAREST), (left, top))
        label, predicted = outcomes.label[row], outcomes.predicted[head][row]
        probability = np.exp(-outcomes.loss[head][row])
        pen.text((left, top + height + 2), f"true {names[label][:9]}, {probability:.0%}", fill="black", font=font)
        colour = "grey" if label == predicted else "firebrick"
        pen.text((left, top + height + 17), f"predicted {names[predicted][:10]}", fill=colour, font=font)
    return sheet


def write_mistakes(folder: Path, outcomes: Outcomes, head: int, source: Source, config: FinetuneConfig) -> None:
    """Write the confusion matrix and the worst images into a folder.

    Raises:
      StatedError: it cannot be written to.
    """
    names = source.class_names
    title = f"{outcomes.top(1)[head]:.2%} of {len(outcomes.label):,} images classified correctly"
    matrix = confusion_matrix(outcomes, head, len(names))
    save_picture(draw_confusion(matrix, names, title), folder / CONFUSION, "the picture")
    save_picture(draw_worst(outcomes, head, source, config), folder / WORST, "the picture")
