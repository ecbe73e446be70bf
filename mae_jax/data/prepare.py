"""`mae-jax prepare`: any source to prepared records (see records.py), in several processes, shard by shard.

Worker processes decode, shrink and encode; this one writes. A shard that is complete has a `.json` beside it, and a
command that is run again goes on after the last of those. dataset.json is written when everything else is there.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from array_record.python import array_record_module

from mae_jax.data.images.decode import BrokenImage
from mae_jax.data.images.jpeg import plain_jpeg_size
from mae_jax.data.images.pictures import to_array
from mae_jax.data.parallel import DeadWorkerError, ordered_map
from mae_jax.data.sources.records import INDEX, MANIFEST, NAMES, VERSION, Encoding, Manifest, Shard
from mae_jax.data.sources.shards import Storage, file_sha256
from mae_jax.data.sources.source import Source
from mae_jax.errors import StatedError

_PLAN = "prepare.json"
_CHUNK = 16  # images that a worker process takes at a time


@dataclass(frozen=True)
class Plan:
    """What is prepared, and how: all that decides the records."""

    source: str
    split: str
    images: int  # of the source
    encoding: Encoding = "jpeg"
    size: int = 256  # pixels: of the shorter side, or of the square for raw
    quality: int = 95
    channels: int = 3
    shard_images: int = 4096

    def __post_init__(self) -> None:
        if self.size < 1 or self.shard_images < 1:
            raise ValueError(f"size {self.size} and shard_images {self.shard_images} must be positive")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality {self.quality} is outside 1 .. 100")

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard_images)

    def shard_name(self, number: int) -> str:
        return f"images-{number:05}-of-{self.shards:05}.array_record"


class Row(NamedTuple):
    """One image, prepared; of one that is broken, its name and the reason."""

    record: bytes
    label: int
    height: int
    width: int
    name: str
    broken: str | None = None


def prepare(source: Source, plan: Plan, destination: str, processes: int, tell: Callable[[int], None]) -> Manifest:
    """Write the records of `plan` to `destination`, or the rest of them; `tell` is told how many images are done.

    Raises:
      StatedError: another plan was begun there, there is something else, nothing decodes, or a process was killed.
    """
    storage = Storage(destination)
    if storage.has(MANIFEST):
        raise StatedError(f"{destination} holds prepared records already: choose another folder, or remove it")
    _claim(storage, asdict(plan) | {"names": _fingerprint(source)})
    finished = [number for number in range(plan.shards) if storage.has(f"{plan.shard_name(number)}.json")]
    tell(sum(_shard_images(plan, number) for number in finished))
    todo = [number for number in range(plan.shards) if number not in set(finished)]
    chunks = [
        range(start, min(start + _CHUNK, end))
        for number in todo
        for end in [min((number + 1) * plan.shard_images, plan.images)]
        for start in range(number * plan.shard_images, end, _CHUNK)
    ]
    try:
        with closing(ordered_map(_Convert(source, plan), chunks, processes)) as rows:
            stream = (row for chunk in rows for row in chunk)
            for number in todo:
                _write_shard(storage, plan, number, islice(stream, _shard_images(plan, number)), tell)
    except DeadWorkerError as error:
        raise StatedError(f"{error} The same command goes on where it stopped.") from error
    return _finish(storage, plan, source.class_names)


def _claim(storage: Storage, plan: dict[str, Any]) -> None:
    """Begin in an empty folder, or go on where the same plan was begun, for the same images."""
    if not storage.has(_PLAN):
        if found := [name for name in storage.names() if not name.endswith(".partial")]:
            raise StatedError(f"{storage.address} is not empty, it has {found[0]}: choose another folder")
        storage.make()
        storage.write(_PLAN, json.dumps(plan).encode())
        return
    before = json.loads(storage.read(_PLAN))
    changed = [name for name, value in plan.items() if before.get(name) != value]
    if changed == ["names"]:
        raise StatedError(
            f"{storage.address} was begun with other files of the same number: choose another folder, or remove it"
        )
    if changed:
        was, now = (
            ", ".join(f"{name} {values.get(name)}" for name in changed if name != "names") for values in (before, plan)
        )
        raise StatedError(
            f"{storage.address} was begun with {was}; this command says {now}. Go on with those, or choose another "
            "folder."
        )


def _fingerprint(source: Source) -> str:
    """SHA-256 of what the images are called, in order."""
    digest = hashlib.sha256()
    for index in range(len(source)):
        digest.update(source.name(index).encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()


def _shard_images(plan: Plan, number: int) -> int:
    """Images of the source that belong to a shard, broken ones too."""
    return min(plan.shard_images, plan.images - number * plan.shard_images)


def _write_shard(storage: Storage, plan: Plan, number: int, rows: Iterator[Row], tell: Callable[[int], None]) -> None:
    name = plan.shard_name(number)
    written: list[Row] = []
    broken: list[str] = []
    with storage.new_file(name) as path:
        # A group is read and decompressed whole, and an image alone is what is asked for; images are compressed.
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        try:
            for row in rows:
                if row.broken is None:
                    writer.write(row.record)
                    written.append(row._replace(record=b""))
                else:
                    broken.append(row.broken)
                tell(1)
        finally:
            writer.close()
        shard = Shard(name, len(written), path.stat().st_size, file_sha256(path))
    columns = {field: [getattr(row, field) for row in written] for field in ("label", "height", "width", "name")}
    storage.write(f"{name}.json", json.dumps({"shard": asdict(shard), "broken": broken, **columns}).encode())


def _finish(storage: Storage, plan: Plan, class_names: tuple[str, ...]) -> Manifest:
    """Join what is known of the shards, and tidy up."""
    parts = [json.loads(storage.read(f"{plan.shard_name(number)}.json")) for number in range(plan.shards)]
    manifest = Manifest(
        version=VERSION,
        source=plan.source,
        split=plan.split,
        encoding=plan.encoding,
        size=0 if plan.encoding == "keep" else plan.size,
        quality=plan.quality,
        channels=plan.channels,
        class_names=list(class_names),
        broken=[line for part in parts for line in part["broken"]],
        shards=[Shard(**part["shard"]) for part in parts if part["shard"]["records"]],
    )
    if not manifest.records:
        _tidy(storage, plan, parts)
        raise StatedError(f"none of the {plan.images} images of {plan.source} decodes: {manifest.broken[0]}")
    index = io.BytesIO()
    label, height, width = (np.array(_joined(parts, key), np.int32) for key in ("label", "height", "width"))
    np.savez(index, label=label, height=height, width=width)
    storage.write(INDEX, index.getvalue())
    storage.write(NAMES, json.dumps(_joined(parts, "name")).encode())
    storage.write(MANIFEST, manifest.to_json())
    _tidy(storage, plan, parts)
    return manifest


def _tidy(storage: Storage, plan: Plan, parts: list[dict]) -> None:
    """Remove what is there to go on from, and shards without a record."""
    for number, part in enumerate(parts):
        storage.remove(f"{plan.shard_name(number)}.json")
        if not part["shard"]["records"]:
            storage.remove(plan.shard_name(number))
    storage.remove(_PLAN)


def _joined(parts: list[dict], key: str) -> list:
    return [value for part in parts for value in part[key]]


@dataclass(frozen=True)
class _Convert:
    """A range of images to their rows."""

    source: Source
    plan: Plan

    def __call__(self, indices: range) -> list[Row]:
        return [self._row(index) for index in indices]

    def _row(self, index: int) -> Row:
        name, label = self.source.name(index), self.source.label(index)
        try:
            record, height, width = prepared(self.source, index, self.plan)
        except BrokenImage as error:
            return Row(b"", label, 0, 0, name, str(error))
        return Row(record, label, height, width, name)


def prepared(source: Source, index: int, plan: Plan) -> tuple[bytes, int, int]:
    """One image as `plan` wants it: the record, and the height and width of what it shows.

    Raises:
      BrokenImage: it does not decode.
    """
    picture = source.picture(index)
    height, width = picture.size_hw
    whole = (0, 0, width, height)
    image = picture.image()  # also of files that are kept: a broken one must not pass
    if plan.encoding == "keep":
        return source.file(index), height, width
    scale = min(1.0, plan.size / min(height, width))
    small_hw = max(1, round(height * scale)), max(1, round(width * scale))
    if plan.encoding == "raw":
        return picture.resized(whole, (plan.size, plan.size)).tobytes(), *small_hw
    if scale == 1 and plain_jpeg_size(file := source.file(index), image.mode) is not None:
        return file, height, width  # nothing to gain from another loss
    pixels = to_array(image) if scale == 1 else picture.resized(whole, small_hw)
    grey = pixels.shape[2] == 1
    encoded = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), plan.quality, "GRAY" if grey else "RGB", "Gray" if grey else "420"
    )
    return encoded, *small_hw
