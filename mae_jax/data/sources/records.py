"""Prepared records: a folder of ArrayRecord shards, made by `mae-jax prepare`, and how a run reads it.

    dataset.json                        what it is, and of each shard: file, records, bytes, SHA-256; written last
    index.npz                           int32 (records,): label, height, width
    names.json                          what each image was called where it came from
    images-00000-of-00004.array_record  one image a record

A record is an image file (encoding `jpeg` or `keep`), or for `raw` the uint8 pixels (size, size, channels) of the
image squeezed into a square; `height` and `width` then are its true shape. Records may come from anywhere: what they
claim is held against bounds before it is believed.
"""

import io
import json
import re
import resource
import zipfile
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import dacite
import numpy as np
from array_record.python import array_record_module
from PIL import Image

from mae_jax.data.images.decode import BrokenImage, Picture, Squeezed, mode_for, open_picture
from mae_jax.data.sources.shards import OnDisk, Storage
from mae_jax.errors import NoSuchSplitError, StatedError
from mae_jax.files import parse_json

MANIFEST, INDEX, NAMES = "dataset.json", "index.npz", "names.json"
VERSION = 1

_COLUMNS = ("label", "height", "width")  # of index.npz
_MOST_RECORDS = 2**31
_NAMES_BYTES = 2**31
_HEADER_BYTES = 2**12  # of a .npy file, at most
_MOST_READERS = 512  # shards that are open at once, or a fourth of what this process may open

Encoding = Literal["jpeg", "raw", "keep"]


@dataclass(frozen=True)
class Shard:
    """One file of records."""

    file: str
    records: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What dataset.json holds."""

    version: int
    source: str
    split: str
    encoding: Encoding
    size: int  # pixels: the shorter side (jpeg), the side of the square (raw); 0 for keep
    quality: int  # of JPEG
    channels: int
    class_names: list[str]
    broken: list[str]  # images that were left out, each with its reason
    shards: list[Shard]

    @property
    def records(self) -> int:
        return sum(shard.records for shard in self.shards)

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode()


def read_manifest(storage: Storage) -> Manifest:
    """Read the description of prepared records.

    Raises:
      StatedError: there is none, or it is not one that this version reads.
    """
    origin = f"{storage.address}/{MANIFEST}"
    try:
        found = parse_json(storage.read(MANIFEST), origin, MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StatedError(
            f"{storage.address} has no {MANIFEST}: it is no folder of prepared records, or `mae-jax prepare` did not "
            "end there; run it again, it goes on where it stopped",
            field="data",
        ) from error
    version = found.get("version") if isinstance(found, dict) else None
    if version != VERSION:
        raise StatedError(f"{origin} has version {_cut(version)}, {VERSION} is read here", field=MANIFEST)
    try:
        manifest = dacite.from_dict(Manifest, found, dacite.Config(strict=True))
    except dacite.DaciteError as error:
        raise _damaged(origin, _cut(error), MANIFEST) from error
    for shard in manifest.shards:
        _check_shard(storage, shard, origin)
    if not 0 < manifest.records <= _MOST_RECORDS:
        raise _damaged(origin, f"records: {_cut(manifest.records)}", MANIFEST)
    return manifest


def read_index(content: bytes, records: int, origin: str) -> dict[str, np.ndarray]:
    """Read the columns of index.npz, int32 (records,) each; nothing is inflated, or larger than it may be.

    Raises:
      StatedError: it is damaged, or not of so many records.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return {name: _read_column(archive, f"{name}.npy", records) for name in _COLUMNS}
    except (OSError, EOFError, LookupError, ValueError, RuntimeError, MemoryError, zipfile.BadZipFile) as error:
        raise _damaged(origin, f"{type(error).__name__}: {_cut(error)}", INDEX) from error


class RecordSource:
    """The images of a folder of prepared records, which may be any address that fsspec knows.

    The split `train` is ADDRESS/train, or ADDRESS itself where that has no records; any other must be a folder in it.
    Shards that are not on this disk are fetched whole, when they are first needed, into a cache (cache.py).

    Raises:
      StatedError: there are no records, or they are damaged or too many for the cache, or have another number of
        channels.
    """

    in_memory = False

    def __init__(self, address: str, mode: str = "RGB", split: str = "train") -> None:
        self.storage = _split_storage(address, split)
        self.manifest = manifest = read_manifest(self.storage)
        if manifest.encoding == "raw" and mode != mode_for(manifest.channels):
            raise StatedError(
                f"records:{address} holds raw pixels of {manifest.channels} channels and model.in_channels asks for "
                f"{1 if mode == 'L' else 3}: prepare them with --channels {1 if mode == 'L' else 3}",
                field="model.in_channels",
            )
        self.class_names = tuple(manifest.class_names)
        self._mode = mode
        self._ends = np.cumsum([shard.records for shard in manifest.shards])
        self._read_index()
        if self.storage.is_local:
            _check_sizes(self.storage, manifest)  # elsewhere each is checked whole when it has been fetched
        else:
            from mae_jax.data.sources.cache import check_room  # noqa: PLC0415 - what is here is not fetched

            check_room(sum(shard.bytes for shard in manifest.shards), f"records:{address}")
        self._names: list[str] | None = None
        self._shard = _few_open(self._open_shard)

    def __len__(self) -> int:
        return len(self._label)

    def name(self, index: int) -> str:
        try:
            origin = f"{self.storage.address}/{NAMES}"
            self._names = self._names or parse_json(self.storage.read(NAMES, _NAMES_BYTES), origin, NAMES)
            name = self._names[index]
        except (OSError, LookupError, TypeError, StatedError):  # asked for in reports of other faults, which come first
            name = f"{NAMES} is missing or damaged"
        return f"{self.storage.address}[{index}] ({_cut(name, 1000)})"

    def label(self, index: int) -> int:
        return int(self._label[index])

    def file(self, index: int) -> bytes:
        """Return the bytes of record `index`.

        Raises:
          BrokenImage: the record is damaged, or its shard is missing.
        """
        shard = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        try:
            reader, _ = self._shard(shard)
            return reader.read([index - first])[0]
        except StatedError:
            raise
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise BrokenImage(f"record {index} of {self.storage.address}", reason, _AGAIN) from error

    def picture(self, index: int) -> Picture:
        """Return image `index`, in the size that was prepared.

        Raises:
          BrokenImage: the record is damaged.
        """
        data, name = self.file(index), f"record {index} of {self.storage.address}"
        if self.manifest.encoding != "raw":
            return open_picture(data, self._mode, name)
        side, channels = self.manifest.size, self.manifest.channels
        if len(data) != side * side * channels:
            raise BrokenImage(name, f"{len(data)} bytes are no {side} x {side} x {channels}", _AGAIN)
        pixels = np.frombuffer(data, np.uint8).reshape(side, side, channels)
        return Squeezed(pixels, (int(self._height[index]), int(self._width[index])))

    def load(self, index: int) -> Image.Image:
        """Return the same image, decoded.

        Raises:
          BrokenImage: it does not decode.
        """
        return self.picture(index).image()

    def _read_index(self) -> None:
        origin = f"{self.storage.address}/{INDEX}"
        records = self.manifest.records
        try:
            content = self.storage.read(INDEX, len(_COLUMNS) * (4 * records + 2 * _HEADER_BYTES))
        except OSError as error:
            raise _damaged(origin, type(error).__name__, INDEX) from error
        index = read_index(content, records, origin)
        self._label, self._height, self._width = (index[name] for name in _COLUMNS)
        if min(self._height.min(), self._width.min()) < 1:
            raise _damaged(origin, "it has images without pixels", INDEX)
        if self._label.min() < -1 or self._label.max() >= len(self.class_names):
            raise _damaged(origin, f"it has labels beyond the {len(self.class_names)} classes", INDEX)

    def _open_shard(self, number: int) -> tuple[Any, OnDisk]:
        """Open a shard to read from; it stays on the disk for as long as both are kept."""
        shard = self.manifest.shards[number]
        place = self.storage.on_disk(shard.file, shard.sha256, shard.bytes)
        # One record at a time, in any order: nothing is gained by reading on.
        return array_record_module.ArrayRecordReader(place.path, options="readahead_buffer_size:0"), place

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_shard"} | {"_names": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._shard = _few_open(self._open_shard)  # a worker process opens the files itself


_AGAIN = "Copy the records again, or prepare them again."


def _few_open(function: Any) -> Any:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return lru_cache(_MOST_READERS if most < 0 else max(1, min(_MOST_READERS, most // 4)))(function)


def _split_storage(address: str, split: str) -> Storage:
    outer = Storage(address)
    inner = outer.within(split)
    if inner.has(MANIFEST):
        return inner
    if split != "train":
        raise NoSuchSplitError(
            f"data records:{address} has no split {split!r}: there is no {inner.address}/{MANIFEST}", field="split"
        )
    return outer


def _check_shard(storage: Storage, shard: Shard, origin: str) -> None:
    if storage.leads_out(shard.file):
        raise StatedError(
            f"{origin} names the shard {_cut(shard.file)!r}, which is no file in its folder: prepare the records again",
            field=MANIFEST,
        )
    if (
        not 1 <= shard.records <= _MOST_RECORDS
        or not 1 <= shard.bytes < 2**63
        or not re.fullmatch("[0-9a-f]{64}", shard.sha256)
    ):
        raise _damaged(origin, f"records, bytes or sha256 of {_cut(shard.file)}", MANIFEST)


def _check_sizes(storage: Storage, manifest: Manifest) -> None:
    for shard in manifest.shards:
        found = storage.size(shard.file)
        if found != shard.bytes:
            state = "is missing" if found is None else f"has {found:,} bytes"
            raise StatedError(
                f"{storage.address}/{shard.file} {state}, {shard.bytes:,} were prepared: copy it again, or prepare the "
                "records again",
                field=shard.file,
            )


def _read_column(archive: zipfile.ZipFile, name: str, records: int) -> np.ndarray:
    about = archive.getinfo(name)
    if about.compress_type != zipfile.ZIP_STORED or about.file_size > 4 * records + _HEADER_BYTES:
        raise ValueError(f"{name} is larger than {records} labels and sizes are")
    with archive.open(about) as file:
        version = np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file) if version == (1, 0) else ((), False, None)
        if shape != (records,) or dtype != np.int32:
            raise ValueError(f"{name} has shape {_cut(shape)} and is {dtype}, not {records} of int32")
        return np.frombuffer(file.read(4 * records), np.int32, records)


def _damaged(origin: str, what: str, field: str) -> StatedError:
    return StatedError(f"{origin} is damaged: {what}. Copy the records again, or prepare them again.", field=field)


def _cut(value: object, most: int = 200) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}..."
