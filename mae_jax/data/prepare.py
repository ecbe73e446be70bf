"""`mae-jax prepare`: any source to prepared records (see records.py), shard by shard.

Threads or worker processes decode, shrink and encode; this one writes. A shard that is complete has a `.json` beside
it, and a command that is run again goes on after the last of those. dataset.json is written when everything else is
there. One process writes to a folder at a time.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from array_record.python import array_record_module

from mae_jax.data.images.decode import BrokenImage, plain_jpeg_size, to_array
from mae_jax.data.images.resize import resize_part
from mae_jax.data.loader import OrderedMap, default_readers
from mae_jax.data.sources.records import INDEX, MANIFEST, NAMES, VERSION, Encoding, Manifest, Shard
from mae_jax.data.sources.shards import Storage, file_sha256
from mae_jax.data.sources.source import Source
from mae_jax.errors import StatedError
from mae_jax.files import LOCK, hold, parse_json

_PLAN = "prepare.json"
_CHUNK = 16  # images that are handed to a thread or worker process at a time
_JPEG_SIDE = 65_500  # pixels, at most, of what libjpeg writes


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


def prepare(source: Source, plan: Plan, destination: str, workers: int, report: Callable[[int], None]) -> Manifest:
    """Write the records of `plan` to `destination`, or the rest of them, by `workers` processes or, for 0, in threads.

    report: called with the number of images that have been done since the last call.

    Raises:
      StatedError: another process writes there or has begun another plan, there is something else, nothing decodes, or
        a worker process was killed.
    """
    storage = Storage(destination)
    _require_unprepared(storage)  # before anything is made there, and before the names are read, which takes its time
    plan_of_images = asdict(plan) | {"names": _fingerprint(source)}
    storage.make()
    with ExitStack() as held:
        if (
            storage.is_local
        ):  # elsewhere two processes of one plan write the same bytes, and of two plans one is refused
            held.enter_context(hold(storage.folder, "destination"))
        _require_unprepared(storage)  # again: another process may have ended there before this one held the folder
        _claim(storage, plan_of_images)
        return _write(source, plan, storage, workers, report)


def _require_unprepared(storage: Storage) -> None:
    """Refuse a folder of prepared records, and one that holds other things than a plan that was begun."""
    if storage.has(MANIFEST):
        raise StatedError(
            f"{storage.address} holds prepared records already: choose another folder, or remove it",
            field="destination",
        )
    if not storage.has(_PLAN) and (found := [name for name in storage.names() if not name.startswith(".")]):
        raise StatedError(
            f"{storage.address} is not empty, it has {found[0]}: choose another folder", field="destination"
        )


def _write(source: Source, plan: Plan, storage: Storage, workers: int, report: Callable[[int], None]) -> Manifest:
    """Write the shards that are missing, and then what describes them."""
    finished = [number for number in range(plan.shards) if storage.has(f"{plan.shard_name(number)}.json")]
    report(sum(_shard_images(plan, number) for number in finished))
    todo = [number for number in range(plan.shards) if number not in set(finished)]
    chunks = [
        range(start, min(start + _CHUNK, end))
        for number in todo
        for end in [min((number + 1) * plan.shard_images, plan.images)]
        for start in range(number * plan.shard_images, end, _CHUNK)
    ]
    threads = default_readers(source.in_memory)
    with OrderedMap(_Convert(source, plan), chunks, workers=workers, threads=threads) as rows:
        stream = (row for chunk in rows for row in chunk)
        for number in todo:
            _write_shard(storage, plan, number, islice(stream, _shard_images(plan, number)), report)
    return _finish(storage, plan, source.class_names)


def _claim(storage: Storage, plan: dict[str, Any]) -> None:
    """Begin a plan, or go on where the same plan was begun, for the same images."""
    try:
        storage.create(_PLAN, json.dumps(plan).encode())
        return
    except FileExistsError:
        before = parse_json(storage.read(_PLAN), f"{storage.address}/{_PLAN}", "destination")
    if not isinstance(before, dict):
        before = {}
    changed = [name for name, value in plan.items() if before.get(name) != value]
    if changed == ["names"]:
        raise StatedError(
            f"{storage.address} was begun with other files of the same number: choose another folder, or remove it",
            field="destination",
        )
    if changed:
        was, now = (
            ", ".join(f"{name} {values.get(name)}" for name in changed if name != "names") for values in (before, plan)
        )
        raise StatedError(
            f"{storage.address} was begun with {was}; this command has {now}. Go on with those, or choose another "
            "folder.",
            field="destination",
        )


def _fingerprint(source: Source) -> str:
    """Return the SHA-256 of what the images are called, in order."""
    digest = hashlib.sha256()
    for index in range(len(source)):
        digest.update(source.name(index).encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()


def _shard_images(plan: Plan, number: int) -> int:
    """Return how many images of the source belong to a shard, broken ones too."""
    return min(plan.shard_images, plan.images - number * plan.shard_images)


def _write_shard(storage: Storage, plan: Plan, number: int, rows: Iterator[Row], report: Callable[[int], None]) -> None:
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
                report(1)
        finally:
            writer.close()
        shard = Shard(name, len(written), path.stat().st_size, file_sha256(path))
    columns = {field: [getattr(row, field) for row in written] for field in ("label", "height", "width", "name")}
    storage.write(f"{name}.json", json.dumps({"shard": asdict(shard), "broken": broken, **columns}).encode())


def _finish(storage: Storage, plan: Plan, class_names: tuple[str, ...]) -> Manifest:
    """Join what is known of the shards, and tidy up."""
    parts = [_read_part(storage, f"{plan.shard_name(number)}.json") for number in range(plan.shards)]
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
        raise StatedError(
            f"none of the {plan.images} images of {plan.source} decodes: {manifest.broken[0]}", field="source"
        )
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
    if storage.is_local:
        (storage.folder / LOCK).unlink(missing_ok=True)


def _read_part(storage: Storage, name: str) -> dict:
    return parse_json(storage.read(name, 2**30), f"{storage.address}/{name}", "destination")


def _joined(parts: list[dict], key: str) -> list:
    return [value for part in parts for value in part[key]]


@dataclass(frozen=True)
class _Convert:
    """Turns a range of images into their rows."""

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
    """Return one image as `plan` wants it: the record, and the height and width of what it shows.

    Raises:
      BrokenImage: it does not decode, or JPEG does not hold it.
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
        return resize_part(picture, whole, (plan.size, plan.size)).tobytes(), *small_hw
    if scale == 1 and plain_jpeg_size(file := source.file(index), image.mode) is not None:
        return file, height, width  # nothing to gain from another loss
    if max(small_hw) > _JPEG_SIDE:
        raise BrokenImage(
            source.name(index),
            f"JPEG holds {_JPEG_SIDE:,} pixels a side, and this would have {max(small_hw):,}: cut it, or take encoding "
            "raw or keep",
        )
    pixels = to_array(image) if scale == 1 else resize_part(picture, whole, small_hw)
    grey = pixels.shape[2] == 1
    encoded = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), plan.quality, "GRAY" if grey else "RGB", "Gray" if grey else "420"
    )
    return encoded, *small_hw
