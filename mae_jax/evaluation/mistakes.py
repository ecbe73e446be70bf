"""Which classes are taken for which, and the images that were named worst."""

from pathlib import Path

import numpy as np
from jaxtyping import Int
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from mae_jax.atomic import save_picture
from mae_jax.config import FinetuneConfig
from mae_jax.data.evaluation import load_samples
from mae_jax.data.sources import Source
from mae_jax.evaluation.scores import Outcomes

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
