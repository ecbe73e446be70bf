"""`mae-jax inspect`: what a source holds, which files are broken, and a sheet of samples."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mae_jax.data.images.decode import BrokenImage
from mae_jax.data.images.resize import center_crop
from mae_jax.data.loader import OrderedMap, default_readers
from mae_jax.data.sources.records import RecordSource
from mae_jax.data.sources.shards import file_sha256
from mae_jax.data.sources.source import Source
from mae_jax.errors import StatedError
from mae_jax.files import save_picture

_CHUNK = 16  # images that are handed to a thread or worker process at a time
_TILE = 96  # pixels
_COLUMNS = 10


class Found(NamedTuple):
    """One image: its size, or why it does not decode; a small picture of it where it is a sample."""

    height: int
    width: int
    broken: str | None = None
    tile: Image.Image | None = None


@dataclass(frozen=True)
class Report:
    """What was found in a source."""

    name: str
    labels: np.ndarray  # int32 (images,)
    class_names: tuple[str, ...]
    sizes: np.ndarray  # int64 (decoded, 2): height and width
    broken: list[str]
    damaged: list[str]  # shards that are not what they were
    tiles: list[Image.Image]

    def __str__(self) -> str:
        counts = np.bincount(self.labels[self.labels >= 0], minlength=len(self.class_names))
        lines = [f"{self.name}: {len(self.labels):,} images"]
        if len(counts):
            lines.append(f"classes: {len(counts):,}, of {np.min(counts):,} to {np.max(counts):,} images")
        if unlabelled := int((self.labels < 0).sum()):
            lines.append(f"without a class: {unlabelled:,}")
        if len(self.sizes):
            for what, values in (
                ("shorter side", self.sizes.min(axis=1)),
                ("longer side", self.sizes.max(axis=1)),
            ):
                lines.append(f"{what}: {np.min(values)} to {np.max(values)} pixels, median {np.median(values):.0f}")
        lines.append(f"broken: {len(self.broken):,}")
        lines += [f"  {reason}" for reason in self.broken + self.damaged]
        return "\n".join(lines)


def inspect_source(source: Source, name: str, workers: int, samples: int, report: Callable[[int], None]) -> Report:
    """Decode every image of `source`, by `workers` processes or, for 0, in threads.

    `samples` of them, evenly spread, are kept for the sheet. `report` is called with the number of images that have
    been done since the last call.
    """
    step = max(1, len(source) // max(1, samples))
    look = _Look(source, frozenset(range(0, step * samples, step)))
    chunks = [range(start, min(start + _CHUNK, len(source))) for start in range(0, len(source), _CHUNK)]
    found: list[Found] = []
    threads = default_readers(source.in_memory)
    with OrderedMap(look, chunks, workers=workers, threads=threads) as results:
        for result in results:
            found += result
            report(len(result))
    return Report(
        name,
        np.array([source.label(index) for index in range(len(source))], np.int32),
        source.class_names,
        np.array([(one.height, one.width) for one in found if one.broken is None], np.int64).reshape(-1, 2),
        [one.broken for one in found if one.broken is not None],
        damaged_shards(source) if isinstance(source, RecordSource) else [],
        [one.tile for one in found if one.tile is not None],
    )


def damaged_shards(source: RecordSource) -> list[str]:
    """Return a line for each shard whose checksum is not the one in dataset.json."""
    lines = []
    for shard in source.manifest.shards:
        try:
            place = source.storage.on_disk(shard.file, shard.sha256, shard.bytes)
            if file_sha256(place.path) != shard.sha256:
                lines.append(f"{shard.file} is not the file that was prepared: its SHA-256 differs")
        except (OSError, StatedError) as error:
            lines.append(f"{shard.file} cannot be read: {error}")
    return lines


def write_sheet(tiles: list[Image.Image], path: Path) -> None:
    """Draw a contact sheet; its ending is that of a kind of picture.

    Raises:
      StatedError: it cannot be written.
    """
    rows = -(-len(tiles) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _TILE, max(1, rows) * _TILE), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % _COLUMNS * _TILE, number // _COLUMNS * _TILE))
    save_picture(sheet, path, "sheet")


@dataclass(frozen=True)
class _Look:
    """Turns a range of images into what was found."""

    source: Source
    samples: frozenset[int]

    def __call__(self, indices: range) -> list[Found]:
        return [self._one(index) for index in indices]

    def _one(self, index: int) -> Found:
        try:
            picture = self.source.picture(index)
            image = picture.image()
        except BrokenImage as error:
            return Found(0, 0, str(error))
        tile = center_crop(image, (_TILE, _TILE)) if index in self.samples else None
        return Found(*picture.size_hw, None, tile)
