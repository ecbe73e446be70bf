"""Prepared records as a run reads them: from wherever they are, damaged, and made to do harm."""

import dataclasses
import io
import json
import os
import resource
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_jax.config import ModelConfig, PretrainConfig
from mae_jax.data.loader import join
from mae_jax.data.sources.records import INDEX, MANIFEST, NAMES, RecordSource, read_index
from mae_jax.data.sources.source import open_source
from mae_jax.data.stream import training_batches
from mae_jax.errors import NoSuchSplitError
from tests.data.records import Make, prepared
from tests.refusals import refused


def test_splits_are_folders(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder("photos", 4)
    prepared(folder, tmp_path / "r/train")
    prepared(folder, tmp_path / "r/val", encoding="keep")
    assert open_source(f"records:{tmp_path}/r", 3).manifest.encoding == "jpeg"
    assert open_source(f"records:{tmp_path}/r", 3, "val").manifest.encoding == "keep"
    with refused("split", "has no split 'test'", kind=NoSuchSplitError):
        open_source(f"records:{tmp_path}/r", 3, "test")


@pytest.mark.parametrize("address", ["nosuchkind://x", "s3:"])
def test_addresses_that_are_not_known(address: str, tmp_path: Path) -> None:
    with refused("data"):
        RecordSource(address if "nosuch" in address else str(tmp_path / address))


def test_records_in_an_archive(make_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address of fsspec that is more than a prefix and a path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = prepared(make_folder("photos", 3), tmp_path / "records/train")
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path)
    packed = open_source(f"records:zip://records::{archive}", 3)
    assert [packed.file(i) for i in range(3)] == [source.file(i) for i in range(3)]


@pytest.mark.parametrize("encoding", ["jpeg", "raw"])
def test_workers_read_records_alike(make_folder: Make, tmp_path: Path, encoding: str) -> None:
    records = prepared(make_folder("photos", 20), tmp_path / "records", encoding=encoding)
    config = PretrainConfig(model=ModelConfig(image_size=16, patch_size=8), batch_size=20, workers=0)
    found = []
    for workers in (0, 2):
        with training_batches(records, dataclasses.replace(config, workers=workers), stop_step=2) as batches:
            found.append(join(list(batches)))
    assert all((found[0][key] == found[1][key]).all() for key in found[0])


def test_names_and_index_are_in_step(make_folder: Make, tmp_path: Path) -> None:
    records = prepared(make_folder("photos", 7), tmp_path / "records")
    names = json.loads((tmp_path / "records/names.json").read_text())
    with np.load(io.BytesIO((tmp_path / "records/index.npz").read_bytes())) as index:
        for i in range(7):
            assert records.picture(i).size_hw == (index["height"][i], index["width"][i])
    assert len(names) == 7


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}"])
def test_images_without_names_are_still_read(make_folder: Make, tmp_path: Path, content: bytes | None) -> None:
    source = prepared(make_folder("photos", 2), tmp_path / "records")
    names = tmp_path / "records" / NAMES
    names.unlink()
    if content is not None:
        names.write_bytes(content)
    assert source.name(1) == f"{tmp_path}/records[1] (names.json is missing or damaged)"
    assert source.load(1).size


def test_a_shard_that_is_cut_or_missing_is_noticed_at_once(make_folder: Make, tmp_path: Path) -> None:
    prepared(make_folder("photos", 7), tmp_path / "records")
    shard = tmp_path / "records/images-00001-of-00002.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with refused(shard.name, f"has {len(whole) - 1:,} bytes, {len(whole):,}"):
        RecordSource(str(tmp_path / "records"))
    shard.unlink()
    with refused(shard.name, "is missing"):
        RecordSource(str(tmp_path / "records"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (MANIFEST, b"{", "is not JSON"),
        (MANIFEST, b"[" * 100_000, "nested too deep"),
        (MANIFEST, b'{"version": ' + b"9" * 5000 + b"}", "digits"),
        (MANIFEST, b'{"version": 9}', "has version 9, 1 is read here"),
        (MANIFEST, b'{"version": "' + b"9" * 5000 + b'"}', "has version 999"),
        (MANIFEST, b"[]", "has version None"),
        (MANIFEST, b'{"version": 1, "quality": 95}', "is damaged: missing value"),
        (INDEX, b"no", "is damaged: BadZipFile"),
        (INDEX, b"PK\x03\x04 cut", "is damaged: BadZipFile"),
        (INDEX, None, "is damaged: FileNotFoundError"),
    ],
)
def test_damaged_descriptions(make_folder: Make, tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    prepared(make_folder("photos", 2), tmp_path / "records")
    (tmp_path / "records" / name).unlink()
    if content is not None:
        (tmp_path / "records" / name).write_bytes(content)
    with refused(name, f"{tmp_path}/records/{name}", words) as caught:
        RecordSource(str(tmp_path / "records"))
    assert len(str(caught.value)) < 1000


def change_shard(folder: Path, **changes: Any) -> None:
    """Have dataset.json claim something else of its first shard."""
    about = json.loads((folder / MANIFEST).read_text())
    about["shards"][0] |= changes
    (folder / MANIFEST).write_text(json.dumps(about))


@pytest.mark.parametrize(
    "file", ["../../dev/zero", "/dev/zero", "", ".", "..", "train/../x", ".hidden", "a\\b", "a\0b"]
)
def test_shards_outside_of_the_folder_are_refused(make_folder: Make, tmp_path: Path, file: str) -> None:
    prepared(make_folder("photos", 2), tmp_path / "records")
    change_shard(tmp_path / "records", file=file)
    with refused(MANIFEST, "which is no file in its folder"):
        RecordSource(str(tmp_path / "records"))


def test_shards_by_links_that_lead_out_are_refused(make_folder: Make, tmp_path: Path) -> None:
    source = prepared(make_folder("photos", 2), tmp_path / "records")
    (tmp_path / "linked").symlink_to(tmp_path / "records")  # of the folder itself: that is the user's affair
    assert RecordSource(str(tmp_path / "linked")).file(1) == source.file(1)
    shard = tmp_path / "records" / source.manifest.shards[0].file
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with refused(MANIFEST, "which is no file in its folder"):
        RecordSource(str(tmp_path / "records"))


@pytest.mark.parametrize("name", [MANIFEST, INDEX])
def test_devices_are_not_read(make_folder: Make, tmp_path: Path, name: str) -> None:
    prepared(make_folder("photos", 2), tmp_path / "records")
    (tmp_path / "records" / name).unlink()
    (tmp_path / "records" / name).symlink_to("/dev/zero")
    with refused(name, "is no regular file"):
        RecordSource(str(tmp_path / "records"))


@pytest.mark.parametrize(
    "changes",
    [
        {"sha256": "../../../.ssh/authorized_keys"},
        {"sha256": ""},
        {"records": -1},
        {"records": 10**18},
        {"records": 10**4200},
        {"bytes": 0},
        {"bytes": 10**30},
    ],
)
def test_what_a_shard_cannot_be(make_folder: Make, tmp_path: Path, changes: dict[str, Any]) -> None:
    prepared(make_folder("photos", 2), tmp_path / "records")
    change_shard(tmp_path / "records", **changes)
    with refused(MANIFEST, "is damaged: records, bytes or sha256 of images-00000") as caught:
        RecordSource(str(tmp_path / "records"))
    assert len(str(caught.value)) < 1000


def archive(compression: int, **columns: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as file:
        for name, column in columns.items():
            file.writestr(f"{name}.npy", column)
    return content.getvalue()


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


GOOD = npy(np.ones(5, np.int32))


def test_an_index_is_read() -> None:
    found = read_index(archive(zipfile.ZIP_STORED, label=GOOD, height=GOOD, width=GOOD), 5, "it")
    assert {name: column.tolist() for name, column in found.items()} == {
        name: [1] * 5 for name in ("label", "height", "width")
    }


@pytest.mark.parametrize(
    ("compression", "label"),
    [
        (zipfile.ZIP_DEFLATED, GOOD + bytes(3 * 10**8)),
        (zipfile.ZIP_DEFLATED, GOOD),
        (zipfile.ZIP_STORED, GOOD + bytes(10**6)),
        (zipfile.ZIP_STORED, GOOD[:-4]),
        (zipfile.ZIP_STORED, npy(np.ones(4, np.int32))),
        (zipfile.ZIP_STORED, npy(np.ones(5, np.int64))),
        (zipfile.ZIP_STORED, GOOD.replace(b"(5,), ", b"(10**9,), ")),
        (zipfile.ZIP_STORED, b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000),
        (zipfile.ZIP_STORED, b"\x93NUMPY\x03\x00"),
        (zipfile.ZIP_STORED, b""),
    ],
)
def test_an_index_is_within_bounds_before_it_is_read(compression: int, label: bytes) -> None:
    """Of 300 MB of zeros remain 300 KB in a zip file."""
    content = archive(compression, label=label, height=GOOD, width=GOOD)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with refused(INDEX, "is damaged"):
        read_index(content, 5, "it")
    assert time.monotonic() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize(("column", "value"), [("height", 0), ("width", -3), ("label", 2), ("label", -2)])
def test_an_index_of_what_cannot_be(make_folder: Make, tmp_path: Path, column: str, value: int) -> None:
    prepared(make_folder("photos", 2), tmp_path / "records")
    with np.load(tmp_path / "records" / INDEX) as stored:
        index = {name: stored[name].copy() for name in stored}
    index[column][1] = value
    np.savez(tmp_path / "records" / INDEX, **index)
    with refused(INDEX, "is damaged"):
        RecordSource(str(tmp_path / "records"))


def test_few_shards_are_open_at_once(make_folder: Make, tmp_path: Path) -> None:
    """As many as this process may open are of no use to it."""
    records = prepared(make_folder("photos", 40), tmp_path / "records", shard_images=1)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, before[1]))
    try:
        source = RecordSource(str(tmp_path / "records"))
        assert [source.file(i) for i in range(40)] == [source.file(i) for i in range(40)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(records) == 40
