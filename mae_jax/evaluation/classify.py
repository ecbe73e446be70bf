"""Which classes are taken for which, and the images that were named worst."""

import contextlib
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
from mae_jax.data.sources.split import Chosen
from mae_jax.errors import StatedError
from mae_jax.files import save_picture
from mae_jax.hosts import Hosts
from mae_jax.models import Params
from mae_jax.models.classifier import Classifier, Pooled
from mae_jax.train.classification import folded, head_logits
from mae_jax.train.objective import normalise_images

_MOST = 256  # images a device at once


class Outcomes(NamedTuple):
    """What was made of each image, of each head; images that do not decode or have no class are left out.

    rank: classes that were given a higher score than the true one.
    """

    rank: Int[np.ndarray, "heads images"]
    named: Int[np.ndarray, "heads images"]
    loss: Float[np.ndarray, "heads images"]
    label: Int[np.ndarray, " images"]
    place: Int[np.ndarray, " images"]  # in the source
    left_out: int

    def top(self, count: int) -> Float[np.ndarray, " heads"]:
        """The share of the images whose true class is among the `count` that were given the highest scores."""
        return (self.rank < count).mean(axis=1)


@partial(jax.jit, static_argnames=("config", "augment"))
def _judge(
    params: Params,
    images: UInt8[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
    config: ClassifierConfig,
    augment: AugmentConfig,
) -> tuple[Int[Array, "heads batch"], Int[Array, "heads batch"], Float[Array, "heads batch"]]:
    """Rank, class named and loss; of equal scores the class that comes first wins."""
    params = folded(params)
    pixels = normalise_images(images, augment, wide(config.model.dtype))
    pooled = cast(Pooled, Classifier(config).apply({"params": params}, pixels, method="pool"))
    logits = head_logits(params["head"], pooled)
    logits = logits.reshape(-1, *logits.shape[-2:])
    truth = jnp.take_along_axis(logits, labels[None, :, None], axis=-1)
    before = jnp.arange(logits.shape[-1]) < labels[:, None]
    rank = ((logits > truth) | ((logits == truth) & before)).sum(axis=-1)
    rank = jnp.where(jnp.isfinite(logits).all(axis=-1), rank, logits.shape[-1])  # nothing is above nan
    loss = jax.nn.logsumexp(logits, axis=-1) - truth[..., 0]
    return rank, logits.argmax(axis=-1), loss


def _whole(values: jax.Array) -> np.ndarray:
    return np.asarray(values if values.is_fully_addressable else multihost_utils.process_allgather(values, tiled=True))


def judge(
    params: Params,
    source: Source,
    config: FinetuneConfig,
    put: Callable[[Any], Any],
    devices: int,
    hosts: Hosts,
) -> Outcomes:
    """Show every image of a source to a classifier, centre crops; on several hosts each reads its own share.

    put: lays rows of this host out over all devices, of which there are `devices`.

    Raises:
      StatedError: no image decodes and has a class.
    """
    batch = -(-min(_MOST * devices, len(source)) // devices) * devices
    own, count = batch // hosts.count, -(-len(source) // batch)
    places = [
        first * batch + hosts.index * own + row for first in range(count) for row in range(own)
    ]  # of this host's rows; those beyond the end are not counted
    shown = Chosen(source, [min(place, len(source) - 1) for place in places])
    model = config.model
    found: list[tuple[np.ndarray, ...]] = []
    read = evaluation_batches(shown, model.image_hw, model.in_channels, own, share=config.augment.evaluation_crop)
    with contextlib.closing(read) as batches:
        for number, rows in enumerate(batches):
            images = np.zeros((own, *model.image_hw, model.in_channels), np.uint8)
            labels = np.full(own, -1, np.int32)
            at = rows["index"] - number * own
            images[at], labels[at] = rows["image"], rows["label"]
            index = np.asarray(places[number * own : (number + 1) * own])
            labels[index >= len(source)] = -1
            laid = put((images, labels, index.astype(np.int32)))
            judged = _judge(params, laid[0], jnp.maximum(laid[1], 0), config.classifier, config.augment)
            found.append(tuple(map(_whole, (*judged, laid[1], laid[2]))))
    rank, named, loss = (np.concatenate([part[i] for part in found], axis=1) for i in range(3))
    label, index = (np.concatenate([part[i] for part in found]) for i in (3, 4))
    known = label >= 0
    if not known.any():
        raise StatedError(f"none of the {len(source):,} images to evaluate on decodes and has a class")
    return Outcomes(
        rank[:, known], named[:, known], loss[:, known], label[known], index[known], len(source) - int(known.sum())
    )


CONFUSION, WORST = "confusion.png", "worst.png"
_NAMED = 50  # classes whose names fit beside a matrix
_COUNTED = 20  # classes whose counts fit into it


def confusion_matrix(outcomes: Outcomes, head: int, classes: int) -> Int[np.ndarray, "classes classes"]:
    """How many images of each class (rows) were named as each class (columns)."""
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (outcomes.label, outcomes.named[head]), 1)
    return matrix


def draw_confusion(matrix: Int[np.ndarray, "classes classes"], names: tuple[str, ...], title: str) -> Image.Image:
    """The matrix as a picture, each row as shares of its class."""
    classes = len(matrix)
    side = min(14.0, 3 + 0.45 * classes)
    figure = Figure(figsize=(side, side), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(title=title, xlabel="named as", ylabel="is")
    if classes <= _NAMED:
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
    """The images with the largest losses, the largest first.

    Below each: what it is and how probable that was thought, and what it was named, in red where that is wrong.
    """
    image_hw, share, names = config.model.image_hw, config.augment.evaluation_crop, source.class_names
    order = np.argsort(-outcomes.loss[head], kind="stable")[:count]
    scale = max(1, 96 // max(image_hw))
    height, width = image_hw[0] * scale, max(image_hw[1] * scale, 120)
    columns, font = min(8, len(order)), ImageFont.load_default(size=12)
    rows = -(-len(order) // columns)
    sheet = Image.new("RGB", (columns * (width + 6) + 6, rows * (height + 40) + 6), "white")
    pen = ImageDraw.Draw(sheet)
    for place, row in enumerate(order):
        left, top = 6 + place % columns * (width + 6), 6 + place // columns * (height + 40)
        pixels = load_samples(source, [int(outcomes.place[row])], 1, image_hw, share)[0]
        shown = Image.fromarray(pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., 0])
        sheet.paste(shown.resize((image_hw[1] * scale, height), Image.Resampling.NEAREST), (left, top))
        right, named = outcomes.label[row], outcomes.named[head][row]
        about = f"is {names[right]}, {np.exp(-outcomes.loss[head][row]):.0%}"
        pen.text((left, top + height + 2), about[:20], fill="black", font=font)
        colour = "grey" if right == named else "firebrick"
        pen.text((left, top + height + 17), f"named {names[named]}"[:20], fill=colour, font=font)
    return sheet


def write_mistakes(folder: Path, outcomes: Outcomes, head: int, source: Source, config: FinetuneConfig) -> None:
    """Both pictures into a folder.

    Raises:
      StatedError: it cannot be written to.
    """
    names = source.class_names
    title = f"{outcomes.top(1)[head]:.2%} of {len(outcomes.label):,} images named rightly"
    matrix = confusion_matrix(outcomes, head, len(names))
    save_picture(draw_confusion(matrix, names, title), folder / CONFUSION, "the picture")
    save_picture(draw_worst(outcomes, head, source, config), folder / WORST, "the picture")
