"""The training stream: source, shuffle, repeat, crop, flip and distort, batches.

The stream of examples has positions 0, 1, 2 ...; the position alone fixes which image comes (a new order each
epoch), its crop, its flip and how it is distorted. So the batches are the same for any number of workers and hosts and
after any restart, and going on at a step is arithmetic: nothing of the iterator is saved.

With repeats, that many positions in a row, a group, show one image, which is decoded once (Hoffer et al. 2019).
"""

from dataclasses import dataclass
from functools import partial
from typing import NotRequired, TypedDict, cast

import grain
import numpy as np

from mae_jax import rng
from mae_jax.config import RunConfig
from mae_jax.data.images.decode import BrokenImage
from mae_jax.data.images.pictures import Picture
from mae_jax.data.images.transforms import augment, crop_box, distort, flips
from mae_jax.data.loader import Batches, Part, default_readers, join, part_size
from mae_jax.data.sources.source import Source
from mae_jax.errors import StatedError

_Row = dict[str, np.ndarray | np.generic]

# So many broken files in a row are a disk that has gone, not files that are broken.
_REPLACEMENTS = 64


class TrainingBatch(TypedDict):
    """One batch of the stream, or one host's rows of it."""

    image: np.ndarray  # uint8 (batch, height, width, channels); (batch, canvas, canvas, channels) for crops "device"
    position: np.ndarray  # uint32 (batch,), in the stream of all examples: step * global batch + row
    label: np.ndarray  # int32 (batch,), of the image that is shown; -1 where there is no class
    broken: np.ndarray  # int64 (batch,), index in the source of this position's own file if it was replaced, else -1
    crop: NotRequired[np.ndarray]  # for crops "device", float32 (batch, 5): left, top, right, bottom of canvas; flip


def training_batches(
    source: Source,
    config: RunConfig,
    *,
    start_step: int = 0,
    stop_step: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches[TrainingBatch]:
    """The batches of steps `start_step` up to `stop_step` (without end by default), `config.batch_size` rows each.

    Of several hosts, host `process_index` gets the rows of its own, an equal run of each global batch: laid one after
    another in the order of the hosts they are the batch that one host alone would get.

    A file that does not decode is replaced by the next position's, with its own position's crop and flip, so that
    no position moves.

    Raises:
      StatedError: `stop_step` is beyond the 32-bit positions, or the batch cannot be shared among so many hosts; or,
        while iterating, 64 files in a row do not decode, or a worker process was killed.
    """
    steps = rng.MAX_POSITION // config.batch_size
    if stop_step is not None and stop_step > steps:
        raise StatedError(
            f"{stop_step} steps of batch_size {config.batch_size} pass position 2^32; {steps} are the most"
        )
    if config.batch_size % (config.repeats * process_count):
        raise StatedError(
            f"batch_size {config.batch_size} is not divisible by repeats {config.repeats} x {process_count} hosts"
        )
    groups = config.batch_size // config.repeats
    own = groups // process_count
    part = part_size(own)
    per_batch = own // part
    order_seed = int(rng.host_generator(config.seed, "order", 0).integers(2**32))
    order = grain.MapDataset.range(len(source)).shuffle(seed=order_seed).repeat(rng.MAX_POSITION // len(source) + 1)
    read = _Part(source, order, config, groups, process_index * own, per_batch, part)
    stop_step = steps if stop_step is None else stop_step
    readers = default_readers(source.in_memory)
    height, width = (config.canvas,) * 2 if config.crops == "device" else config.model.image_hw
    return Batches(
        grain.MapDataset.range(start_step * per_batch, stop_step * per_batch).map(read),
        per_batch,
        _joined,
        workers=readers if config.workers is None else config.workers,
        threads=readers,
        part_bytes=part * config.repeats * height * width * config.model.in_channels,
    )


def _joined(parts: list[Part]) -> TrainingBatch:
    return cast(TrainingBatch, join(parts))


@dataclass(frozen=True)
class _Part:
    """The number of a part in this host's stream to its rows.

    A part at a time and not a row: Grain's own cost for each thing that it hands on is that of a small crop.
    """

    source: Source
    order: grain.MapDataset  # source indices by group
    config: RunConfig
    groups: int  # in a global batch
    first: int  # of this host's groups in a global batch
    per_batch: int  # parts
    part: int  # groups

    def __call__(self, number: int) -> Part:
        step, place = divmod(number, self.per_batch)
        start = step * self.groups + self.first + place * self.part
        rows = [row for group in range(start, start + self.part) for row in self._rows(group)]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def _rows(self, group: int) -> list[_Row]:
        """The rows of one image."""
        own = self.order[group]
        repeats = self.config.repeats
        for skip in range(_REPLACEMENTS):
            shown = self.order[group + skip] if skip else own
            about: _Row = {"label": np.int32(self.source.label(shown)), "broken": np.int64(-1 if shown == own else own)}
            try:
                picture = self.source.picture(shown)
                return [
                    {**self._view(picture, position), "position": np.uint32(position), **about}
                    for position in range(group * repeats, (group + 1) * repeats)
                ]
            except BrokenImage as error:
                last = error
        raise StatedError(f"{_REPLACEMENTS} images in a row do not decode; the last: {last}. Check the disk.")

    def _view(self, picture: Picture, position: int) -> _Row:
        """What a position shows of a picture."""
        config = self.config
        crop, flip = (rng.host_generator(config.seed, stream, position) for stream in ("crop", "flip"))
        if config.crops == "host":
            pixels = augment(picture, config.augment, config.model.image_hw, crop, flip)
            return {
                "image": distort(pixels, config.augment, partial(rng.host_generator, config.seed, position=position))
            }
        side, (height, width) = config.canvas, picture.size_hw
        left, top, right, bottom = crop_box(picture.size_hw, config.augment, config.model.image_hw, crop)
        box = (left * side / width, top * side / height, right * side / width, bottom * side / height)
        whole = picture.resized((0, 0, width, height), (side, side), fast=config.augment.resize == "fast")
        return {"image": whole, "crop": np.array([*box, flips(config.augment, flip)], np.float32)}
