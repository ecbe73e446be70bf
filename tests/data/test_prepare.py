"""Prepared records: written, read, interrupted, damaged."""

import errno
import io
import json
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from mae_jax.config import ModelConfig, PretrainConfig
from mae_jax.data.images.decode import Squeezed, to_array
from mae_jax.data.inspect import inspect_source, write_sheet
from mae_jax.data.loader import join
from mae_jax.data.prepare import Plan, prepare
from mae_jax.data.sources.records import INDEX, MANIFEST, NAMES, RecordSource
from mae_jax.data.sources.shards import Storage
from mae_jax.data.sources.source import Source, open_source
from mae_jax.data.stream import training_batches
from mae_jax.errors import StatedError

Make = Callable[..., Path]


def prepared(folder: Path, destination: Path | str, *, processes: int = 0, **changes: object) -> RecordSource:
    """The records of a folder of images."""
    source = open_source(f"folder:{folder}", 3)
    plan = Plan(f"folder:{folder}", "train", len(source), **{"size": 32, "shard_images": 5, **changes})
    prepare(source, plan, str(destination), processes, lambda count: None)
    return RecordSource(str(destination))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_jpeg_records_have_the_shorter_side_and_the_labels(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder("photos", 12)
    source, records = open_source(f"folder:{folder}", 3), prepared(folder, tmp_path / "records")
    assert sorted(path.name for path in (tmp_path / "records").iterdir()) == [
        "dataset.json",
        *(f"images-{i:05}-of-00003.array_record" for i in range(3)),
        "index.npz",
        "names.json",
    ]
    assert records.class_names == ("a", "b")
    assert len(records) == 12
    for i in range(12):
        original, picture = source.load(i), records.picture(i)
        assert records.label(i) == source.label(i)
        assert source.name(i) in records.name(i)
        assert min(picture.size_hw) == 32
        ratio = picture.size_hw[0] / picture.size_hw[1]
        assert ratio == pytest.approx(original.height / original.width, abs=1 / 32)
        small = original.resize(picture.size_hw[::-1], Image.Resampling.BICUBIC)
        assert np.abs(to_array(small).astype(int) - to_array(records.load(i))).mean() < 6  # noise, JPEG twice


def test_small_and_kept_files_are_left_alone(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder("photos", 6)
    source = open_source(f"folder:{folder}", 3)
    for name, changes in (("small", {"size": 1000}), ("keep", {"encoding": "keep"})):
        records = prepared(folder, tmp_path / name, **changes)
        assert [records.file(i) for i in range(6)] == [source.file(i) for i in range(6)]


def test_raw_records_are_squares_that_know_their_shape(make_folder: Make, tmp_path: Path) -> None:
    records = prepared(make_folder("photos", 6), tmp_path / "records", encoding="raw")
    for i in range(6):
        picture = records.picture(i)
        assert isinstance(picture, Squeezed)
        assert picture.pixels.shape == (32, 32, 3)
        assert min(picture.size_hw) == 32 < max(picture.size_hw)
    with pytest.raises(StatedError, match="prepare them with --channels 1"):
        RecordSource(str(tmp_path / "records"), "L")


def test_digits_grey(tmp_path: Path) -> None:
    source = open_source("digits", 1)
    prepare(source, Plan("digits", "train", 1797, channels=1, size=8, quality=100), str(tmp_path / "r"), 0, print)
    records = RecordSource(str(tmp_path / "r"), "L")
    assert [records.label(i) for i in range(1797)] == [source.label(i) for i in range(1797)]
    off = [np.abs(to_array(records.load(i)).astype(int) - to_array(source.load(i))).mean() for i in range(0, 1797, 50)]
    assert max(off) < 2


def test_processes_do_not_change_the_files(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder("photos", 40, broken=(3,))
    for processes in (0, 2):
        prepared(folder, tmp_path / str(processes), processes=processes)
    assert files(tmp_path / "0") == files(tmp_path / "2")


def test_broken_images_are_left_out_and_named(make_folder: Make, tmp_path: Path) -> None:
    records = prepared(make_folder("photos", 12, broken=(0, 1, 2, 3, 4, 7)), tmp_path / "records")
    assert len(records) == 6
    assert [shard.records for shard in records.manifest.shards] == [4, 2]  # one shard held nothing
    assert [line.split(" ")[0].rpartition("/")[2] for line in records.manifest.broken] == [
        f"{i:03}.jpg" for i in (0, 1, 2, 3, 4, 7)
    ]
    assert "009.jpg" in records.name(3)
    with pytest.raises(StatedError, match="none of the 3 images"):
        prepared(make_folder("none", 3, broken=(0, 1, 2)), tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [1, 5, 8, 11, 12])
def test_it_goes_on_where_it_stopped(make_folder: Make, tmp_path: Path, after: int) -> None:
    folder = make_folder("photos", 12)
    source = open_source(f"folder:{folder}", 3)
    plan = Plan(f"folder:{folder}", "train", 12, size=32, shard_images=5)
    prepare(source, plan, str(tmp_path / "whole"), 0, lambda count: None)
    done: list[int] = []

    def tell(count: int) -> None:
        done.append(count)
        if sum(done) >= after:
            raise Interrupted

    with pytest.raises(Interrupted):
        prepare(source, plan, str(tmp_path / "parts"), 0, tell)
    assert not [name for name in files(tmp_path / "parts") if name.endswith(".partial")]
    with pytest.raises(StatedError, match="did not end there; run it again"):
        RecordSource(str(tmp_path / "parts"))
    with pytest.raises(StatedError, match=r"was begun with quality 95; this command says quality 90"):
        prepare(source, replace(plan, quality=90), str(tmp_path / "parts"), 0, lambda count: None)
    told: list[int] = []
    prepare(source, plan, str(tmp_path / "parts"), 0, told.append)
    assert told[0] == (after - 1) // 5 * 5  # of shards that were complete
    assert sum(told) == 12
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_what_is_there_is_not_touched(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder("photos", 3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    with pytest.raises(StatedError, match=r"is not empty, it has notes\.txt"):
        prepared(folder, tmp_path / "mine")
    prepared(folder, tmp_path / "records")
    before = files(tmp_path / "records")
    with pytest.raises(StatedError, match="holds prepared records already"):
        prepared(folder, tmp_path / "records")
    assert files(tmp_path / "records") == before


def test_any_address_of_fsspec(make_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = make_folder("photos", 12)
    local, remote = prepared(folder, tmp_path / "local"), prepared(folder, "memory://bucket/records")
    assert [remote.file(i) for i in range(12)] == [local.file(i) for i in range(12)]
    assert len(list((tmp_path / "cache/mae_jax/records").iterdir())) == 3
    assert "bucket/records" in remote.name(0)
    same = open_source(f"records:file://{tmp_path}/local", 3)
    assert same.label(11) == local.label(11) == 1
    assert not fsspec.filesystem("memory").glob("/bucket/records/*.json.partial")


def test_a_shard_that_came_damaged_is_not_kept(
    make_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote = prepared(make_folder("photos", 4), "memory://damaged")
    shard = remote.manifest.shards[0].file
    with fsspec.open(f"memory://damaged/{shard}", "wb") as file:
        file.write(b"something else")
    with pytest.raises(StatedError, match=r"has SHA-256 .* was changed or came damaged"):
        remote.file(0)
    assert list((tmp_path / "cache/mae_jax/records").iterdir()) == []


@pytest.mark.parametrize("address", ["nosuchkind://x", "s3:"])
def test_addresses_that_are_not_known(address: str, tmp_path: Path) -> None:
    with pytest.raises(StatedError):
        RecordSource(address if "nosuch" in address else str(tmp_path / address))


def test_splits_are_folders(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder("photos", 4)
    prepared(folder, tmp_path / "r/train")
    prepared(folder, tmp_path / "r/val", encoding="keep")
    assert open_source(f"records:{tmp_path}/r", 3).manifest.encoding == "jpeg"
    assert open_source(f"records:{tmp_path}/r", 3, "val").manifest.encoding == "keep"
    with pytest.raises(StatedError, match="has no split 'test'"):
        open_source(f"records:{tmp_path}/r", 3, "test")


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for place in range(200, len(data), 97):
        data[place] ^= 0xFF
    path.write_bytes(data)


def test_damage_is_noticed(make_folder: Make, tmp_path: Path) -> None:
    prepared(make_folder("photos", 12), tmp_path / "records")
    damage(tmp_path / "records/images-00001-of-00003.array_record")
    source = open_source(f"records:{tmp_path}/records", 3)
    report = inspect_source(source, "it", 0, 4, lambda count: None)
    assert len(report.broken) == 5
    assert report.damaged == [
        "images-00001-of-00003.array_record is not the file that was prepared: its SHA-256 differs"
    ]
    config = PretrainConfig(model=ModelConfig(image_size=16, patch_size=8), batch_size=12, workers=0)
    with training_batches(source, config, stop_step=1) as batches:
        assert sorted(next(batches)["broken"].tolist()) == [-1] * 7 + [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (MANIFEST, b"{", "dataset.json is damaged"),
        (MANIFEST, b'{"version": 9}', "has version 9, 1 is read here"),
        (MANIFEST, b"[]", "has version None"),
        (MANIFEST, b'{"version": 1, "quality": 95}', "dataset.json is damaged: missing value"),
        (INDEX, b"no", "index.npz cannot be read"),
        (INDEX, b"PK\x03\x04 cut", r"index.npz cannot be read.*BadZipFile"),
    ],
)
def test_damaged_descriptions(make_folder: Make, tmp_path: Path, name: str, content: bytes, words: str) -> None:
    prepared(make_folder("photos", 2), tmp_path / "records")
    (tmp_path / "records" / name).write_bytes(content)
    with pytest.raises(StatedError, match=words):
        RecordSource(str(tmp_path / "records"))


def test_inspect_counts_measures_and_draws(make_folder: Make, tmp_path: Path) -> None:
    source: Source = open_source(f"folder:{make_folder('photos', 12, broken=(2,))}", 3)
    told: list[int] = []
    report = inspect_source(source, "photos", 0, 5, told.append)
    assert sum(told) == 12
    text = str(report)
    for words in (
        "photos: 12 images",
        "classes: 2, of 6 to 6 images",
        "shorter side: 40 to 46",
        "broken: 1",
        "002.jpg",
    ):
        assert words in text
    write_sheet(report.tiles, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (960, 96)
    with pytest.raises(StatedError, match=r"sheet\.xyz cannot be written"):
        write_sheet(report.tiles, tmp_path / "sheet.xyz")
    assert [path.name for path in tmp_path.iterdir() if "sheet" in path.name] == ["sheet.png"]


def test_a_sheet_on_a_read_only_disk_is_said_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, to remove what is not there fails too."""

    def read_only(*args: object, **settings: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Image.Image, "save", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(StatedError, match=r"sheet\.png cannot be written: Read-only file system$"):
        write_sheet([], tmp_path / "sheet.png")


@pytest.mark.parametrize("changes", [{"size": 0}, {"quality": 101}, {"shard_images": 0}])
def test_plans_that_cannot_be(changes: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(changes.values())))):
        Plan("digits", "train", 10, **changes)


def test_a_shard_that_is_cut_or_missing_is_noticed_at_once(make_folder: Make, tmp_path: Path) -> None:
    prepared(make_folder("photos", 7), tmp_path / "records")
    shard = tmp_path / "records/images-00001-of-00002.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(StatedError, match=rf"00001-of-00002.array_record has {len(whole) - 1:,} bytes, {len(whole):,}"):
        RecordSource(str(tmp_path / "records"))
    shard.unlink()
    with pytest.raises(StatedError, match=r"00001-of-00002.array_record is missing"):
        RecordSource(str(tmp_path / "records"))


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}"])
def test_images_without_names_are_still_read(make_folder: Make, tmp_path: Path, content: bytes | None) -> None:
    source = prepared(make_folder("photos", 2), tmp_path / "records")
    names = tmp_path / "records" / NAMES
    names.unlink()
    if content is not None:
        names.write_bytes(content)
    assert source.name(1) == f"{tmp_path}/records[1] (names.json is missing or damaged)"
    assert source.load(1).size


def test_a_file_in_the_way_of_the_records(make_folder: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    for place in ("file", "file/below"):
        with pytest.raises(StatedError, match="cannot be made a folder"):
            prepared(make_folder("photos", 2), tmp_path / place)
        with pytest.raises(StatedError, match=r"has no dataset\.json"):
            RecordSource(str(tmp_path / place))


def test_a_full_disk_is_said_in_a_sentence(make_folder: Make, tmp_path: Path) -> None:
    """A limit on the size of files stands for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(
            StatedError, match=r"images-00000-of-00001.array_record cannot be written: .*File too large"
        ):
            prepared(make_folder("photos", 3), tmp_path / "records", encoding="raw", size=128)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "records").iterdir()] == ["prepare.json"]


def test_it_does_not_go_on_with_other_files(make_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder("photos", 7)
    with monkeypatch.context() as patch:
        patch.setattr("mae_jax.data.prepare._finish", lambda *arguments: pytest.fail("stopped here"))
        with pytest.raises(pytest.fail.Exception):
            prepared(folder, tmp_path / "records")
    first = next(folder.rglob("000.jpg"))
    first.rename(first.with_name("010.jpg"))
    with pytest.raises(StatedError, match="was begun with other files of the same number"):
        prepared(folder, tmp_path / "records")
    first.with_name("010.jpg").rename(first)
    assert len(prepared(folder, tmp_path / "records")) == 7


def test_records_in_an_archive(make_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address of fsspec that is more than a prefix and a path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = prepared(make_folder("photos", 3), tmp_path / "records/train")
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path)
    packed = open_source(f"records:zip://records::{archive}", 3)
    assert [packed.file(i) for i in range(3)] == [source.file(i) for i in range(3)]


def test_storage_leaves_nothing_half_written(tmp_path: Path) -> None:
    def write_half(storage: Storage) -> None:
        with storage.new_file("a.json") as path:
            path.write_text("half")
            raise Interrupted

    for address in (str(tmp_path / "x"), "memory://half"):
        storage = Storage(address)
        storage.make()
        with pytest.raises(Interrupted):
            write_half(storage)
        assert storage.names() == []
        storage.write("a.json", b"whole")
        assert (storage.names(), storage.read("a.json")) == (["a.json"], b"whole")


@pytest.mark.parametrize("encoding", ["jpeg", "raw"])
def test_workers_read_records_alike(make_folder: Make, tmp_path: Path, encoding: str) -> None:
    records = prepared(make_folder("photos", 20), tmp_path / "records", encoding=encoding)
    config = PretrainConfig(model=ModelConfig(image_size=16, patch_size=8), batch_size=20, workers=0)
    found = []
    for workers in (0, 2):
        with training_batches(records, replace(config, workers=workers), stop_step=2) as batches:
            found.append(join(list(batches)))
    assert all((found[0][key] == found[1][key]).all() for key in found[0])


def test_names_and_index_are_in_step(make_folder: Make, tmp_path: Path) -> None:
    records = prepared(make_folder("photos", 7), tmp_path / "records")
    names = json.loads((tmp_path / "records/names.json").read_text())
    with np.load(io.BytesIO((tmp_path / "records/index.npz").read_bytes())) as index:
        for i in range(7):
            assert records.picture(i).size_hw == (index["height"][i], index["width"][i])
    assert len(names) == 7
