"""Images as an evaluation sees them: every one once, in the source's order, the middle cut out."""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import grain
import numpy as np

from mae_jax.data.images.decode import BrokenImage, decode, mode_for
from mae_jax.data.images.pictures import to_array
from mae_jax.data.images.transforms import center_crop
from mae_jax.data.loader import Batches, Part, default_readers, join, part_size
from mae_jax.data.sources.source import Source
from mae_jax.errors import StatedError


class EvaluationBatch(TypedDict):
    """One batch; the last one is smaller, and so is one with broken files, whose rows are left out."""

    image: np.ndarray  # uint8 (rows, height, width, channels)
    label: np.ndarray  # int32 (rows,), -1 where there is no class
    index: np.ndarray  # int64 (rows,), in the source
    broken: np.ndarray  # int64 (batch - rows,), index in the source of each file that was left out


def evaluation_batches(
    source: Source,
    image_hw: tuple[int, int],
    in_channels: int,
    batch_size: int,
    *,
    share: float = 1.0,
    workers: int = 0,
) -> Batches[EvaluationBatch]:
    """All images of `source`, centre crops of `image_hw`, in threads unless `workers` processes are asked for.

    `share` of the shorter side is in a crop, here and below (`AugmentConfig.evaluation_crop`).
    """
    part = part_size(batch_size)
    rows = grain.MapDataset.range(len(source)).map(_Row(source, image_hw, in_channels, share))
    return Batches(
        rows.batch(part),
        batch_size // part,
        _without_broken,
        workers=workers,
        threads=default_readers(source.in_memory),
        part_bytes=part * image_hw[0] * image_hw[1] * in_channels,
    )


def load_images(files: Sequence[str], image_hw: tuple[int, int], in_channels: int, share: float = 1.0) -> np.ndarray:
    """Image files to uint8 (files, height, width, in_channels), centre crops.

    Raises:
      StatedError: a file does not decode.
    """
    try:
        images = [decode(file, mode_for(in_channels)) for file in files]
    except BrokenImage as error:
        raise StatedError(f"{error}. Give image files that can be read.") from error
    return np.stack([to_array(center_crop(image, image_hw, share)) for image in images])


def load_samples(
    source: Source, order: Iterable[int], count: int, image_hw: tuple[int, int], share: float = 1.0
) -> np.ndarray:
    """The first `count` images of `source`, in the given order of indices, that decode: uint8, centre crops.

    Raises:
      StatedError: none of them does.
    """
    images: list[np.ndarray] = []
    for index in order:
        with contextlib.suppress(BrokenImage):
            images.append(to_array(center_crop(source.load(index), image_hw, share)))
        if len(images) == count:
            break
    if not images:
        raise StatedError(f"no image decodes, {source.name(0)} the first of them")
    return np.stack(images)


@dataclass(frozen=True)
class _Row:
    """Source index to one row of a batch; a broken file's row is black and marked."""

    source: Source
    image_hw: tuple[int, int]
    in_channels: int
    share: float

    def __call__(self, index: int) -> dict[str, np.ndarray | np.generic]:
        try:
            crop = center_crop(self.source.load(index), self.image_hw, self.share)
            image, broken = to_array(crop), False
        except BrokenImage:
            image, broken = np.zeros((*self.image_hw, self.in_channels), np.uint8), True
        return {
            "image": image,
            "label": np.int32(self.source.label(index)),
            "index": np.int64(index),
            "broken": np.bool_(broken),
        }


def _without_broken(parts: list[Part]) -> EvaluationBatch:
    batch = join(parts)
    broken = batch["broken"]
    good = batch if not broken.any() else {key: values[~broken] for key, values in batch.items()}
    return EvaluationBatch(image=good["image"], label=good["label"], index=good["index"], broken=batch["index"][broken])
