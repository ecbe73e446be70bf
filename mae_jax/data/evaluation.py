"""Images as an evaluation sees them: every one once, in the source's order, the middle cut out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from mae_jax.data.images.decode import BrokenImage, decode, mode_for, to_array
from mae_jax.data.images.resize import center_crop
from mae_jax.data.loader import Batches, OrderedMap, Part, default_readers, join, part_size
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
    workers: int | None = None,
) -> Batches[EvaluationBatch]:
    """Return all images of `source` in order, as centre crops of `image_hw`.

    They are read in threads unless a number of worker processes is asked for. `share` of the shorter side is in a
    crop, here and below (`AugmentConfig.evaluation_crop`).
    """
    part, count = part_size(batch_size), len(source)
    readers = default_readers(source.in_memory)
    reading = OrderedMap(
        _PartReader(source, image_hw, in_channels, share),
        (range(start, min(start + part, count)) for start in range(0, count, part)),
        workers=workers or 0,
        threads=readers,
        ahead=batch_size // part,
    )
    return Batches(reading, batch_size // part, _without_broken)


def load_images(files: Sequence[str], image_hw: tuple[int, int], in_channels: int, share: float = 1.0) -> np.ndarray:
    """Read image files as centre crops, uint8 (files, height, width, in_channels).

    Raises:
      StatedError: a file does not decode.
    """
    try:
        images = [decode(file, mode_for(in_channels)) for file in files]
    except BrokenImage as error:
        raise StatedError(f"{error}. {error.advice}", field="images") from error
    return np.stack([to_array(center_crop(image, image_hw, share)) for image in images])


def load_samples(
    source: Source, order: Iterable[int], count: int, image_hw: tuple[int, int], share: float = 1.0
) -> np.ndarray:
    """Read the first `count` images of `source`, in the given order of indices, that decode: uint8, centre crops.

    Raises:
      StatedError: none of them does.
    """
    images: list[np.ndarray] = []
    failure: BrokenImage | None = None
    for index in order:
        try:
            images.append(to_array(center_crop(source.load(index), image_hw, share)))
        except BrokenImage as error:
            failure = failure or error
        if len(images) == count:
            break
    if not images:
        first = f"; the first: {failure}. {failure.advice}" if failure else ""
        raise StatedError(f"no image decodes{first}", field="data")
    return np.stack(images)


@dataclass(frozen=True)
class _PartReader:
    """Indices of a source to a part of a batch; a broken file's row is black and marked."""

    source: Source
    image_hw: tuple[int, int]
    in_channels: int
    share: float

    def __call__(self, indices: range) -> Part:
        images = np.zeros((len(indices), *self.image_hw, self.in_channels), np.uint8)
        labels = np.zeros(len(indices), np.int32)
        broken = np.zeros(len(indices), np.bool_)
        for row, index in enumerate(indices):
            labels[row] = self.source.label(index)
            try:
                images[row] = to_array(center_crop(self.source.load(index), self.image_hw, self.share))
            except BrokenImage:
                broken[row] = True
        return {"image": images, "label": labels, "index": np.array(indices, np.int64), "broken": broken}


def _without_broken(parts: list[Part]) -> EvaluationBatch:
    batch = join(parts)
    broken = batch["broken"]
    good = batch if not broken.any() else {key: values[~broken] for key, values in batch.items()}
    return EvaluationBatch(image=good["image"], label=good["label"], index=good["index"], broken=batch["index"][broken])
