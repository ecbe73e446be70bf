"""The training stream: source, shuffle, repeat, crop and flip, batches.

The stream of examples has positions 0, 1, 2 ...; the position alone fixes which image comes (a new order each
epoch), its crop and its flip. So the batches are the same for any number of workers and after any restart, and
going on at a step is arithmetic: nothing of the iterator is saved.
"""

from dataclasses import dataclass
from typing import TypedDict

import grain
import numpy as np
from PIL import Image

from mae_jax import rng
from mae_jax.config import AugmentConfig, PretrainConfig
from mae_jax.data.decoding import BrokenImage
from mae_jax.data.reading import Batches, Part, join, part_size
from mae_jax.data.sources import Source
from mae_jax.data.transforms import augment
from mae_jax.data.workers import default_readers
from mae_jax.errors import StatedError

# So many broken files in a row are a disk that has gone, not files that are broken.
_REPLACEMENTS = 64


class TrainingBatch(TypedDict):
    """One batch of the stream."""

    image: np.ndarray  # uint8 (batch, height, width, channels)
    position: np.ndarray  # uint32 (batch,), in the stream of all examples: step * batch + row
    label: np.ndarray  # int32 (batch,), of the image that is shown; -1 where there is no class
    broken: np.ndarray  # int64 (batch,), index in the source of this position's own file if it was replaced, else -1


def training_batches(
    source: Source,
    config: PretrainConfig,
    *,
    start_step: int = 0,
    stop_step: int | None = None,
    host: int = 0,
    hosts: int = 1,
) -> Batches[TrainingBatch]:
    """The batches of steps `start_step` up to `stop_step` (without end by default), `config.batch_size` rows each.

    Of `hosts` that share each batch, `host` reads its own rows alone: the first host the first rows, and so on.

    A file that does not decode is replaced by the next position's, with its own position's crop and flip, so that
    no position moves.

    Raises:
      StatedError: `stop_step` is beyond the 32-bit positions; or, while iterating, 64 files in a row do not decode, or
        a worker process was killed.
    """
    steps = rng.MAX_POSITION // config.batch_size
    if stop_step is not None and stop_step > steps:
        raise StatedError(
            f"{stop_step} steps of batch_size {config.batch_size} pass position 2^32; {steps} are the most"
        )
    order_seed = int(rng.host_generator(config.seed, "order", 0).integers(2**32))
    order = grain.MapDataset.range(len(source)).shuffle(seed=order_seed).repeat(rng.MAX_POSITION // len(source) + 1)
    example = _Example(source, order, config.augment, config.model.image_hw, config.seed)
    part = part_size(config.batch_size // hosts)
    per_batch = config.batch_size // hosts // part
    stop_step = steps if stop_step is None else stop_step
    parts = order.map_with_index(example).batch(part)
    if hosts > 1:
        parts = grain.MapDataset.range(steps * per_batch).map(_PartOfHost(parts, per_batch, host, hosts))
    parts = parts[start_step * per_batch : stop_step * per_batch]
    readers = default_readers(source.in_memory)
    height, width = config.model.image_hw
    return Batches(
        parts,
        per_batch,
        _joined,
        workers=readers if config.workers is None else config.workers,
        threads=readers,
        part_bytes=part * height * width * config.model.in_channels,
    )


@dataclass(frozen=True)
class _PartOfHost:
    """A host's n-th part, of all parts of all batches; each batch has `per_batch` parts for every host."""

    parts: grain.MapDataset
    per_batch: int
    host: int
    hosts: int

    def __call__(self, number: int) -> Part:
        step, part = divmod(number, self.per_batch)
        return self.parts[(step * self.hosts + self.host) * self.per_batch + part]


def _joined(parts: list[Part]) -> TrainingBatch:
    batch = join(parts)
    return TrainingBatch(image=batch["image"], position=batch["position"], label=batch["label"], broken=batch["broken"])


@dataclass(frozen=True)
class _Example:
    """Position and source index to one row of a batch."""

    source: Source
    order: grain.MapDataset  # source indices by position
    augment: AugmentConfig
    image_hw: tuple[int, int]
    seed: int

    def __call__(self, position: int, index: int) -> dict[str, np.ndarray | np.generic]:
        image, shown = self._load(position, index)
        crop, flip = (rng.host_generator(self.seed, stream, position) for stream in ("crop", "flip"))
        return {
            "image": augment(image, self.augment, self.image_hw, crop, flip),
            "position": np.uint32(position),
            "label": np.int32(self.source.label(shown)),
            "broken": np.int64(-1 if shown == index else index),
        }

    def _load(self, position: int, index: int) -> tuple[Image.Image, int]:
        """The image for `position`, and its index in the source."""
        for skip in range(_REPLACEMENTS):
            shown = self.order[position + skip] if skip else index
            try:
                return self.source.load(shown), shown
            except BrokenImage as error:
                last = error
        raise StatedError(f"{_REPLACEMENTS} images in a row do not decode; the last: {last}. Check the disk.")
