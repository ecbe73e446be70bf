"""The training stream: source, shuffle, repeat, then box, decode, resize, flip and distort, and batches.

The stream of examples has positions 0, 1, 2 ...; the position alone fixes which image comes (a new order each
epoch), its crop, its flip and how it is distorted. So the batches are the same for any number of workers and hosts and
after any restart, and going on at a step is arithmetic: nothing of the iterator is saved.

With repeats, that many positions in a row, a group, show one image, which is decoded once (Hoffer et al. 2019).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NotRequired, TypedDict, cast

import cv2
import numpy as np

from mae_jax import rng
from mae_jax.config import AugmentConfig, RunConfig
from mae_jax.data.images.box import choose_box, flips
from mae_jax.data.images.decode import BrokenImage, Picture, to_array
from mae_jax.data.images.resize import resize_box, resize_part
from mae_jax.data.loader import Batches, OrderedMap, Part, default_readers, join, part_size
from mae_jax.data.sources.source import Source
from mae_jax.errors import StatedError

_Row = dict[str, np.ndarray | np.generic]
_Draws = Callable[[str], np.random.Generator]  # the name of a stream to the example's own generator

# So many broken files in a row are no longer passed over: something is wrong with all of them, or with the disk.
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
    """Return the batches of steps `start_step` up to `stop_step` (without end by default), of batch_size rows each.

    They are read in `config.workers` processes, or in threads where that is 0. Of several hosts, host `process_index`
    gets the rows of its own, an equal run of each global batch: laid one after another in the order of the hosts they
    are the batch that one host alone would get.

    A file that does not decode is replaced by the next position's, with its own position's crop and flip, so that
    no position moves.

    Raises:
      StatedError: `stop_step` is beyond the 32-bit positions, or the batch cannot be shared among so many hosts; or,
        while iterating, 64 files in a row do not decode, or a worker process was killed.
    """
    steps = rng.MAX_POSITION // config.batch_size
    if stop_step is None:
        stop_step = steps
    if stop_step > steps:
        raise StatedError(
            f"{stop_step} steps of batch_size {config.batch_size} pass position 2^32; {steps} are the most",
            field="steps",
        )
    if config.batch_size % (config.repeats * process_count):
        raise StatedError(
            f"batch_size {config.batch_size} is not divisible by repeats {config.repeats} x {process_count} hosts",
            field="batch_size",
        )
    groups = config.batch_size // config.repeats
    own = groups // process_count
    part = part_size(own)
    order = Order(len(source), int(rng.host_generator(config.seed, "order", 0).integers(2**32)))

    def parts() -> Iterator[tuple[int, list[int]]]:
        for step in range(start_step, stop_step):
            first = step * groups + process_index * own
            for start in range(first, first + own, part):
                yield start, [order[group] for group in range(start, start + part)]

    readers = default_readers(source.in_memory)
    reading = OrderedMap(
        _PartReader(source, order, config),
        parts(),
        workers=readers if config.workers is None else config.workers,
        threads=readers,
        ahead=own // part,
    )
    return Batches(reading, own // part, lambda parts: cast(TrainingBatch, join(parts)))


class Order:
    """The image that each group of positions shows: every image once an epoch, shuffled anew for each (Grain's)."""

    def __init__(self, images: int, seed: int) -> None:
        self.images, self.seed = images, seed

    def __getitem__(self, group: int) -> int:
        return int(self._shuffled[group])

    @cached_property
    def _shuffled(self) -> Any:
        import grain  # noqa: PLC0415 - a second, and JAX with it, which workers need only where a file is broken

        epochs = rng.MAX_POSITION // self.images + 1
        return grain.MapDataset.range(self.images).shuffle(seed=self.seed).repeat(epochs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Order, (self.images, self.seed)


@dataclass(frozen=True)
class _PartReader:
    """A part of a batch, as its first group and the image of each of its groups, to its rows."""

    source: Source
    order: Order
    config: RunConfig

    def __call__(self, part: tuple[int, list[int]]) -> Part:
        start, images = part
        rows = [row for group, image in enumerate(images, start) for row in self._rows(group, image)]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def _rows(self, group: int, own: int) -> list[_Row]:
        """Return the rows of one group, which shows the image `own`, or the next one that decodes."""
        config, repeats = self.config, self.config.repeats
        view = squeeze if config.crops == "device" else show
        for skip in range(_REPLACEMENTS):
            shown = self.order[group + skip] if skip else own
            about: _Row = {"label": np.int32(self.source.label(shown)), "broken": np.int64(-1 if shown == own else own)}
            try:
                picture = self.source.picture(shown)
                rows = []
                for position in range(group * repeats, (group + 1) * repeats):
                    draws = partial(rng.host_generator, config.seed, position=position)
                    rows.append({**view(picture, config, draws), "position": np.uint32(position), **about})
                return rows
            except BrokenImage as error:
                last = error
        raise StatedError(
            f"{_REPLACEMENTS} images in a row do not decode; the last: {last}. {last.advice}", field="data"
        )


def show(picture: Picture, config: RunConfig, draws: _Draws) -> _Row:
    """Return what a position shows of a picture: uint8 (height, width, channels) as `image`.

    Raises:
      BrokenImage: it does not decode.
    """
    return {"image": augment(picture, config.augment, config.model.image_hw, draws)}


def augment(picture: Picture, config: AugmentConfig, image_hw: tuple[int, int], draws: _Draws) -> np.ndarray:
    """Return a view of a picture of any size, as uint8 (height, width, channels): box, decode, resize, flip, distort.

    `draws` gives the example's own generators, one a stream, so that one does not shift the other.

    Raises:
      BrokenImage: it does not decode.
    """
    box = choose_box(picture.size_hw, config, image_hw, draws("crop"))
    if config.crop == "random":
        pixels = resize_part(picture, box, image_hw, fast=config.resize == "fast")
    else:  # cut out of the resized whole
        pixels = to_array(resize_box(picture.image(), box, image_hw))
    if flips(config, draws("flip")):
        pixels = cv2.flip(pixels, 1).reshape(pixels.shape)
    if config.distorts:
        from mae_jax.data.images.distort import distort  # noqa: PLC0415 - few runs do

        pixels = distort(pixels, config, draws)
    return pixels


def squeeze(picture: Picture, config: RunConfig, draws: _Draws) -> _Row:
    """Return the whole picture squeezed into a square, as `image`, and the box in it that the device cuts, as `crop`.

    Raises:
      BrokenImage: it does not decode.
    """
    side, (height, width) = config.canvas, picture.size_hw
    left, top, right, bottom = choose_box(picture.size_hw, config.augment, config.model.image_hw, draws("crop"))
    box = (left * side / width, top * side / height, right * side / width, bottom * side / height)
    flip = flips(config.augment, draws("flip"))
    whole = resize_part(picture, (0, 0, width, height), (side, side), fast=config.augment.resize == "fast")
    return {"image": whole, "crop": np.array([*box, flip], np.float32)}
