"""Prepared records: a folder of ArrayRecord shards, made by `mae-jax prepare`, and how a run reads it.

    dataset.json                        what it is, and of each shard: file, records, bytes, SHA-256; written last
    index.npz                           int32 (records,): label, height, width
    names.json                          what each image was called where it came from
    images-00000-of-00004.array_record  one image a record

A record is an image file (encoding `jpeg` or `keep`), or for `raw` the uint8 pixels (size, size, channels) of the
image squeezed into a square; `height` and `width` then tell its true shape.
"""

import io
import json
import zipfile
from dataclasses import asdict, dataclass
from typing import Any, Literal

import dacite
import numpy as np
from array_record.python import array_record_module
from PIL import Image

from mae_jax.data.images.decode import BrokenImage, mode_for
from mae_jax.data.images.pictures import Picture, Squeezed, open_picture
from mae_jax.data.sources.shards import Storage
from mae_jax.errors import NoSuchSplitError, StatedError

MANIFEST, INDEX, NAMES = "dataset.json", "index.npz", "names.json"
VERSION = 1

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
    """dataset.json."""

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
    """The description of prepared records.

    Raises:
      StatedError: there is none, or it is not one that this version reads.
    """
    try:
        found = json.loads(storage.read(MANIFEST))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StatedError(
            f"{storage.address} has no {MANIFEST}: it is no folder of prepared records, or `mae-jax prepare` did not "
            "end there; run it again, it goes on where it stopped"
        ) from error
    except ValueError as error:
        raise StatedError(f"{storage.address}/{MANIFEST} is damaged: {error}. Prepare the records again.") from error
    version = found.get("version") if isinstance(found, dict) else None
    if version != VERSION:
        raise StatedError(f"{storage.address}/{MANIFEST} has version {version}, {VERSION} is read here")
    try:
        return dacite.from_dict(Manifest, found, dacite.Config(strict=True))
    except dacite.DaciteError as error:
        raise StatedError(f"{storage.address}/{MANIFEST} is damaged: {error}. Prepare the records again.") from error


class RecordSource:
    """The images of a folder of prepared records, which may be any address that fsspec knows.

    The split `train` is ADDRESS/train, or ADDRESS itself where that has no records; any other must be a folder in it.
    Shards that are not on this disk are fetched whole, when they are first needed, into ~/.cache/mae_jax.

    Raises:
      StatedError: there are no records, or they have another number of channels.
    """

    in_memory = False

    def __init__(self, address: str, mode: str = "RGB", split: str = "train") -> None:
        self.storage = _split_storage(address, split)
        self.manifest = manifest = read_manifest(self.storage)
        if manifest.encoding == "raw" and mode != mode_for(manifest.channels):
            raise StatedError(
                f"records:{address} holds raw pixels of {manifest.channels} channels and model.in_channels asks for "
                f"{1 if mode == 'L' else 3}: prepare them with --channels {1 if mode == 'L' else 3}"
            )
        self.class_names = tuple(manifest.class_names)
        self._mode = mode
        self._ends = np.cumsum([shard.records for shard in manifest.shards])
        try:
            with np.load(io.BytesIO(self.storage.read(INDEX))) as index:
                self._label, self._height, self._width = index["label"], index["height"], index["width"]
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise StatedError(
                f"{self.storage.address}/{INDEX} cannot be read, it is missing or damaged ({type(error).__name__}): "
                "prepare the records again"
            ) from error
        if not len(self._label) == manifest.records > 0:
            raise StatedError(
                f"{self.storage.address} has {manifest.records} records and {len(self._label)} labels: prepare it again"
            )
        if self.storage.is_local:
            _check_sizes(self.storage, manifest)  # elsewhere each is checked whole when it has been fetched
        self._names: list[str] | None = None
        self._readers: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._label)

    def name(self, index: int) -> str:
        try:
            self._names = self._names or json.loads(self.storage.read(NAMES))
            name = self._names[index]
        except (OSError, ValueError, LookupError):  # asked for in reports of other faults, which must not be lost
            name = f"{NAMES} is missing or damaged"
        return f"{self.storage.address}[{index}] ({name})"

    def label(self, index: int) -> int:
        return int(self._label[index])

    def file(self, index: int) -> bytes:
        """The bytes of record `index`.

        Raises:
          BrokenImage: the record is damaged, or its shard is missing.
        """
        shard = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        try:
            return self._reader(shard).read([index - first])[0]
        except StatedError:
            raise
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise BrokenImage(f"record {index} of {self.storage.address}", reason) from error

    def picture(self, index: int) -> Picture:
        """Image `index`, in the size that was prepared.

        Raises:
          BrokenImage: the record is damaged.
        """
        data = self.file(index)
        if self.manifest.encoding != "raw":
            return open_picture(data, self._mode, f"record {index} of {self.storage.address}")
        side, channels = self.manifest.size, self.manifest.channels
        if len(data) != side * side * channels:
            raise BrokenImage(
                f"record {index} of {self.storage.address}", f"{len(data)} bytes are no {side} x {side} x {channels}"
            )
        pixels = np.frombuffer(data, np.uint8).reshape(side, side, channels)
        return Squeezed(pixels, (int(self._height[index]), int(self._width[index])))

    def load(self, index: int) -> Image.Image:
        """The same, decoded.

        Raises:
          BrokenImage: it does not decode.
        """
        return self.picture(index).image()

    def _reader(self, shard: int) -> Any:
        if shard not in self._readers:
            about = self.manifest.shards[shard]
            path = self.storage.on_disk(about.file, about.sha256)
            # One record at a time, in any order: nothing is gained by reading on.
            self._readers[shard] = array_record_module.ArrayRecordReader(path, options="readahead_buffer_size:0")
        return self._readers[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}, "_names": None}  # a worker process opens the files itself


def _split_storage(address: str, split: str) -> Storage:
    outer = Storage(address)
    inner = outer.within(split)
    if inner.has(MANIFEST):
        return inner
    if split != "train":
        raise NoSuchSplitError(f"data records:{address} has no split {split!r}: there is no {inner.address}/{MANIFEST}")
    return outer


def _check_sizes(storage: Storage, manifest: Manifest) -> None:
    for shard in manifest.shards:
        found = storage.size(shard.file)
        if found != shard.bytes:
            state = "is missing" if found is None else f"has {found:,} bytes"
            raise StatedError(
                f"{storage.address}/{shard.file} {state}, {shard.bytes:,} were prepared: copy it again, or prepare the "
                "records again"
            )
