"""What the reference's models are fed with, from the bytes of a file on, by plain loops and textbook formulas.

In the order of the data: which image a position shows, the box that is cut from it, bytes made numbers, noise for the
masks; then what fine-tuning does to a batch (He et al. 2021, appendix A.1). Random bits are those of `draws.py`.
Pixels are resampled by Pillow, and images are (B, C, H, W) once they are normalised.
"""

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from mae_jax.config import AugmentConfig, FinetuneConfig, MixConfig, PretrainConfig, RunConfig, wide
from parity import draws

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
Bytes = UInt8[np.ndarray, "B H W C"]
Images = Float[Tensor, "B C H W"]
Targets = Float[Tensor, "B classes"]

# --- which image a position shows -------------------------------------------------------------------------------------


def order(images: int, seed: int, positions: Iterable[int], repeats: int = 1) -> list[int]:
    """Return the image at each position: each once an epoch, in an order of the epoch's own, `repeats` times in a row.

    An epoch's seed is the run's own draw and the number of the epoch, summed modulo 2^32, and Grain shuffles by it.
    """
    import grain  # noqa: PLC0415 - takes a second, and of all that needs this file only the order needs it

    first = int(draws.host_generator(seed, "order", 0).integers(2**32))
    shown = []
    for position in positions:
        epoch, place = divmod(int(position) // repeats, images)
        shown.append(int(grain.MapDataset.range(images).shuffle(seed=(first + epoch) % 2**32)[place]))
    return shown


# --- pictures, boxes and crops ----------------------------------------------------------------------------------------


def decode(file: bytes, channels: int) -> Image.Image:
    """Decode a file to an upright picture of 1 or 3 channels."""
    with Image.open(io.BytesIO(file)) as image:
        return ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")


def random_resized_crop(
    generator: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Draw a part of random area and shape: ten tries, then the middle (Szegedy et al. 2014, section 6).

    A try draws an area, uniform in `scale` of the whole, and width to height, log-uniform in `ratio`; where it fits,
    top and left follow.
    """
    for _ in range(10):
        area = generator.uniform(scale[0], scale[1]) * (height * width)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        columns, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 1 <= columns <= width and 1 <= rows <= height:
            top = int(generator.integers(0, height - rows, endpoint=True))
            left = int(generator.integers(0, width - columns, endpoint=True))
            return left, top, left + columns, top + rows
    # The largest part whose shape is in range.
    columns = min(width, max(1, round(height * ratio[1])))
    rows = min(height, max(1, round(width / ratio[0])))
    left, top = (width - columns) // 2, (height - rows) // 2
    return left, top, left + columns, top + rows


def crop_of_scaled(
    size_hw: tuple[int, int], cover_hw: tuple[int, int], out_hw: tuple[int, int], generator: np.random.Generator | None
) -> Box:
    """Return the part that shows `out_hw` of a picture once it just covers `cover_hw`: anywhere, or its middle.

    torchvision's `Resize`, then `RandomCrop` or `CenterCrop`.
    """
    scale = max(Fraction(least, size) for least, size in zip(cover_hw, size_hw, strict=True))
    scaled = [int(size * scale) for size in size_hw]
    spare = [whole - out for whole, out in zip(scaled, out_hw, strict=True)]
    if generator is None:
        first = [round(Fraction(n, 2)) for n in spare]
    else:
        first = [int(generator.integers(0, n, endpoint=True)) for n in spare]
    (top, left), (rows, columns), (height, width) = first, out_hw, size_hw
    down, across = Fraction(height, scaled[0]), Fraction(width, scaled[1])  # pixels of the picture to one of the scaled
    return float(left * across), float(top * down), float((left + columns) * across), float((top + rows) * down)


def crop_box(size_hw: tuple[int, int], config: RunConfig, position: int) -> Box:
    """Return the part of a picture that a position shows."""
    augment, out = config.augment, config.model.image_hw
    generator = draws.host_generator(config.seed, "crop", position)
    if augment.crop == "random":
        return random_resized_crop(generator, *size_hw, augment.scale, augment.ratio)
    if augment.crop == "fixed":  # 256 for 224 (Table 1e)
        return crop_of_scaled(size_hw, (round(out[0] * 8 / 7), round(out[1] * 8 / 7)), out, generator)
    return crop_of_scaled(size_hw, out, out, None)


def flipped(config: RunConfig, position: int) -> bool:
    """Return whether a position shows its picture mirrored: half of them do, where it is on."""
    return config.augment.flip and draws.host_generator(config.seed, "flip", position).random() < 0.5


def host_crop(file: bytes, config: RunConfig, position: int) -> UInt8[np.ndarray, "H W C"]:
    """Decode, cut, resize and flip on the host."""
    image = decode(file, config.model.in_channels)
    box = crop_box((image.height, image.width), config, position)
    if config.augment.crop == "random":
        image, box = image.crop(_whole(box)), (0, 0, box[2] - box[0], box[3] - box[1])
    return _as_array(
        image.resize(config.model.image_hw[::-1], Image.Resampling.BICUBIC, box), flipped(config, position)
    )


def canvas(file: bytes, config: RunConfig, position: int) -> tuple[UInt8[np.ndarray, "S S C"], Box, bool]:
    """Squeeze a whole picture into a square for the device to cut from: the square, the box in it, and whether to flip.

    A box is rounded to float32, as it is sent.
    """
    image, side = decode(file, config.model.in_channels), config.canvas
    across, down = side / image.width, side / image.height
    left, top, right, bottom = crop_box((image.height, image.width), config, position)
    scaled = np.array([left * across, top * down, right * across, bottom * down], np.float32)
    left, top, right, bottom = scaled.tolist()
    squeezed = image.resize((side, side), Image.Resampling.BICUBIC)
    return _as_array(squeezed, flip=False), (left, top, right, bottom), flipped(config, position)


def device_crop(
    square: UInt8[np.ndarray, "S S C"], box: Box, flip: bool, image_hw: tuple[int, int]
) -> UInt8[np.ndarray, "H W C"]:
    """Cut a box out of the square, as if there were nothing around the pixels that it touches, resize and flip.

    Columns are resampled before rows, and bytes are rounded in between: Pillow by itself takes first what leaves less
    to do, so that it is called once for each.
    """
    touched = _whole(box)
    image = Image.fromarray(square.squeeze(-1) if square.shape[-1] == 1 else square).crop(touched)
    left, right = box[0] - touched[0], min(box[2] - touched[0], image.width)
    top, bottom = box[1] - touched[1], min(box[3] - touched[1], image.height)
    height, width = image_hw
    narrowed = image.resize((width, image.height), Image.Resampling.BICUBIC, (left, 0, right, image.height))
    return _as_array(narrowed.resize((width, height), Image.Resampling.BICUBIC, (0, top, width, bottom)), flip)


def _whole(box: Box) -> tuple[int, int, int, int]:
    """Return the whole pixels that a box touches by more than its rounding."""
    slack = 1e-3
    left, top, right, bottom = box
    return math.floor(left + slack), math.floor(top + slack), math.ceil(right - slack), math.ceil(bottom - slack)


def _as_array(image: Image.Image, flip: bool) -> UInt8[np.ndarray, "H W C"]:
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image).reshape(image.height, image.width, -1)


# --- pretraining ------------------------------------------------------------------------------------------------------


def normalise(images: Bytes, augment: AugmentConfig, dtype: torch.dtype) -> Images:
    """Scale bytes to 0 .. 1, then each channel by its mean and deviation."""
    mean, std = (torch.tensor(values, dtype=dtype) for values in (augment.mean, augment.std))
    return ((torch.tensor(images).to(dtype) / 255 - mean) / std).movedim(-1, 1).contiguous()


def noise(seed: int, positions: Sequence[int] | np.ndarray, count: int) -> Float[Tensor, "B count"]:
    """Draw the noise that masks are made of, float32 at any precision: a row for each position, from its own key."""
    rows = [draws.uniform(draws.example_key(seed, "mask", int(position)), (count,)) for position in positions]
    return torch.from_numpy(np.stack(rows))


def pretraining_inputs(
    config: PretrainConfig, images: Bytes, positions: Sequence[int] | np.ndarray
) -> tuple[Images, Float[Tensor, "B L"]]:
    """Make a batch of pretraining: normalised images, and the noise of their masks."""
    dtype = getattr(torch, wide(config.model.dtype))
    return normalise(images, config.augment, dtype), noise(config.seed, positions, config.model.num_patches)


# --- fine-tuning and linear probing -----------------------------------------------------------------------------------


def drop_path_uniforms(
    seed: int, positions: Sequence[int] | np.ndarray, depth: int, dtype: torch.dtype
) -> Float[Tensor, "B depth 2"]:
    """Draw one uniform for each branch of each block, in float32, from the key of the example."""
    rows = [draws.uniform(draws.example_key(seed, "drop_path", int(position)), (2 * depth,)) for position in positions]
    return torch.from_numpy(np.stack(rows)).reshape(-1, depth, 2).to(dtype)


@dataclass(frozen=True)
class Rectangle:
    """Whole pixels: rows `top` to `bottom` and columns `left` to `right`, the latter of each not included."""

    top: int
    bottom: int
    left: int
    right: int

    def marked(self, height: int, width: int) -> np.ndarray:
        """Mark its pixels in an image (height, width)."""
        marks = np.zeros((height, width), bool)
        marks[self.top : self.bottom, self.left : self.right] = True
        return marks


def erased(
    seed: int, position: int, chance: float, image_hw: tuple[int, int], dtype: str
) -> tuple[Rectangle | None, draws.Key]:
    """Draw which rectangle of an image is erased, if any, and the key of its noise (Zhong et al. 2017, algorithm 1).

    Area 0.02 .. 1/3 of the image's, height to width log-uniform in 0.3 .. 1/0.3, ten tries: timm's `RandomErasing`.
    """
    height, width = image_hw
    whether, boxes, pixels = draws.split(draws.example_key(seed, "erase", position), 3)
    if draws.uniform(whether, (), dtype) >= chance:
        return None, pixels
    for area, aspect, top, left in draws.uniform(boxes, (10, 4), dtype).tolist():
        area = height * width * (0.02 + (1 / 3 - 0.02) * area)
        aspect = 0.3 ** (1 - 2 * aspect)
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rows < height and columns < width:
            first_row, first_column = int(top * (height - rows + 1)), int(left * (width - columns + 1))
            return Rectangle(first_row, first_row + rows, first_column, first_column + columns), pixels
    return None, pixels


def erase(images: Images, seed: int, positions: Sequence[int] | np.ndarray, chance: float) -> Images:
    """Put normal noise into the rectangle of each image that is erased."""
    dtype = "float64" if images.dtype == torch.float64 else "float32"
    images = images.clone()
    _, channels, height, width = images.shape
    for image, position in zip(images, positions, strict=True):
        box, key = erased(seed, int(position), chance, (height, width), dtype)
        if box is not None:
            pixels = torch.from_numpy(draws.normal(key, (height, width, channels), dtype)).movedim(-1, 0)
            rows, columns = slice(box.top, box.bottom), slice(box.left, box.right)
            image[:, rows, columns] = pixels[:, rows, columns]
    return images


def smoothed(labels: Int[Tensor, "B"], classes: int, smoothing: float, dtype: torch.dtype) -> Targets:
    """Make targets whose cross entropy is PyTorch's own with `label_smoothing` (Szegedy et al. 2015, section 7)."""
    targets = torch.full((len(labels), classes), smoothing / classes, dtype=dtype)
    for row, label in zip(targets, labels.tolist(), strict=True):
        row[label] += 1 - smoothing
    return targets


def partner(row: int) -> int:
    """Return the row with which a row is mixed: its neighbour."""
    return row + 1 if row % 2 == 0 else row - 1


def mixup(images: Images, targets: Targets, share: float) -> tuple[Images, Targets]:
    """Mix images and targets with their neighbours, row by row (Zhang et al. 2017, equation 1)."""
    order = [partner(row) for row in range(len(images))]
    return images * share + images[order] * (1 - share), targets * share + targets[order] * (1 - share)


def cutmix_box(share: float, centre: tuple[float, float], height: int, width: int) -> Rectangle:
    """Return the rectangle of 1 - `share` of the image about a centre in [0, 1)^2, cut off at the edges, as timm's."""
    bounds = []
    for size, middle in zip((height, width), centre, strict=True):
        side, place = int(size * math.sqrt(1 - share)), int(middle * size)
        bounds += [max(place - side // 2, 0), min(place + (side + 1) // 2, size)]
    return Rectangle(*bounds)


def cutmix(images: Images, targets: Targets, share: float, centre: tuple[float, float]) -> tuple[Images, Targets]:
    """Paste a box of the neighbour into images, as timm does (Yun et al. 2019, section 3.1).

    The share of the targets is that of the pixels that stay.
    """
    height, width = images.shape[2:]
    box = cutmix_box(share, centre, height, width)
    mixed = images.clone()
    order = [partner(row) for row in range(len(images))]
    rows, columns = slice(box.top, box.bottom), slice(box.left, box.right)
    mixed[:, :, rows, columns] = images[order][:, :, rows, columns]
    stays = 1 - (box.bottom - box.top) * (box.right - box.left) / (height * width)
    return mixed, targets * stays + targets[order] * (1 - stays)


@dataclass(frozen=True)
class Mixing:
    """How a whole batch is mixed: one draw for all of it."""

    kind: Literal["mixup", "cutmix"]
    share: float  # as it was drawn
    centre: tuple[float, float]  # of cutmix's box


def mixing(config: MixConfig, seed: int, step: int, dtype: str) -> Mixing | None:
    """Draw how the batch of a step is mixed, if at all: which of the two, then the share and the box's centre."""
    if config.mixup == config.cutmix == 0:
        return None
    which, area, place = draws.split(draws.fold_in(draws.device_key(seed, "mix"), step), 3)
    cuts = config.cutmix > 0
    if cuts and config.mixup > 0:
        cuts = bool(draws.uniform(which, (), dtype) < config.cutmix_share)
    share = draws.beta(area, config.cutmix if cuts else config.mixup, dtype)
    down, across = draws.uniform(place, (2,), dtype).tolist()
    return Mixing("cutmix" if cuts else "mixup", share, (down, across))


def classification_inputs(
    config: FinetuneConfig,
    images: Bytes,
    labels: Int[np.ndarray, "B"],
    positions: Sequence[int] | np.ndarray,
    step: int,
) -> tuple[Images, Targets, Float[Tensor, "B depth 2"]]:
    """Make a batch of fine-tuning: images, targets, and drop path's uniforms.

    In timm's order: normalise, erase, smooth the targets, mix.
    """
    precision = wide(config.model.dtype)
    dtype = getattr(torch, precision)
    assert config.classes is not None
    made = erase(normalise(images, config.augment, dtype), config.seed, positions, config.mix.erase)
    targets = smoothed(torch.tensor(labels), config.classes, config.mix.smoothing, dtype)
    drawn = mixing(config.mix, config.seed, step, precision)
    if drawn is not None and drawn.kind == "mixup":
        made, targets = mixup(made, targets, drawn.share)
    elif drawn is not None:
        made, targets = cutmix(made, targets, drawn.share, drawn.centre)
    return made, targets, drop_path_uniforms(config.seed, positions, config.model.encoder.depth, dtype)
