"""Prepared records: written, read, interrupted, damaged."""

import errno
import os
import resource
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_jax.config import ModelConfig, PretrainConfig
from mae_jax.data.images.decode import Squeezed, to_array
from mae_jax.data.inspect import inspect_source, write_sheet
from mae_jax.data.prepare import Plan, prepare
from mae_jax.data.sources.records import RecordSource
from mae_jax.data.sources.shards import Storage
from mae_jax.data.sources.source import Source, open_source
from mae_jax.data.stream import training_batches
from tests.data.records import Make, files, prepared
from tests.disk import REPLACED, recorded
from tests.refusals import refused


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
        assert picture.pixels().shape == (32, 32, 3)
        assert min(picture.size_hw) == 32 < max(picture.size_hw)
    with refused("model.in_channels", "prepare them with --channels 1"):
        RecordSource(str(tmp_path / "records"), "L")


def test_digits_grey(tmp_path: Path) -> None:
    source = open_source("digits", 1)
    prepare(source, Plan("digits", "train", 1797, channels=1, size=8, quality=100), str(tmp_path / "r"), 0, print)
    records = RecordSource(str(tmp_path / "r"), "L")
    assert [records.label(i) for i in range(1797)] == [source.label(i) for i in range(1797)]
    off = [np.abs(to_array(records.load(i)).astype(int) - to_array(source.load(i))).mean() for i in range(0, 1797, 50)]
    assert max(off) < 2


def test_workers_do_not_change_the_files(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder("photos", 40, broken=(3,))
    for workers in (0, 2):
        prepared(folder, tmp_path / str(workers), workers=workers)
    assert files(tmp_path / "0") == files(tmp_path / "2")


def test_broken_images_are_left_out_and_named(make_folder: Make, tmp_path: Path) -> None:
    records = prepared(make_folder("photos", 12, broken=(0, 1, 2, 3, 4, 7)), tmp_path / "records")
    assert len(records) == 6
    assert [shard.records for shard in records.manifest.shards] == [4, 2]  # one shard held nothing
    assert [line.split(" ")[0].rpartition("/")[2] for line in records.manifest.broken] == [
        f"{i:03}.jpg" for i in (0, 1, 2, 3, 4, 7)
    ]
    assert "009.jpg" in records.name(3)
    with refused("source", "none of the 3 images"):
        prepared(make_folder("none", 3, broken=(0, 1, 2)), tmp_path / "empty")
    assert not files(tmp_path / "empty")


ROOT = Path(__file__).parents[2]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [1, 5, 8, 11, 12])
def test_it_goes_on_where_it_stopped(make_folder: Make, tmp_path: Path, after: int) -> None:
    folder = make_folder("photos", 12)
    source = open_source(f"folder:{folder}", 3)
    plan = Plan(f"folder:{folder}", "train", 12, size=32, shard_images=5)
    prepare(source, plan, str(tmp_path / "whole"), 0, lambda count: None)
    done: list[int] = []

    def report(count: int) -> None:
        done.append(count)
        if sum(done) >= after:
            raise Interrupted

    with pytest.raises(Interrupted):
        prepare(source, plan, str(tmp_path / "parts"), 0, report)
    assert not [name for name in files(tmp_path / "parts") if name.endswith(".partial")]
    with refused("data", "did not end there; run it again"):
        RecordSource(str(tmp_path / "parts"))
    with refused("destination", "was begun with quality 95; this command has quality 90"):
        prepare(source, replace(plan, quality=90), str(tmp_path / "parts"), 0, lambda count: None)
    counts: list[int] = []
    prepare(source, plan, str(tmp_path / "parts"), 0, counts.append)
    assert counts[0] == (after - 1) // 5 * 5  # of shards that were complete
    assert sum(counts) == 12
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_what_is_there_is_not_touched(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder("photos", 3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    with refused("destination", "is not empty, it has notes.txt"):
        prepared(folder, tmp_path / "mine")
    prepared(folder, tmp_path / "records")
    before = files(tmp_path / "records")
    with refused("destination", "holds prepared records already"):
        prepared(folder, tmp_path / "records")
    assert files(tmp_path / "records") == before


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


def test_inspect_counts_measures_and_draws(make_folder: Make, tmp_path: Path) -> None:
    source: Source = open_source(f"folder:{make_folder('photos', 12, broken=(2,))}", 3)
    counts: list[int] = []
    report = inspect_source(source, "photos", 0, 5, counts.append)
    assert sum(counts) == 12
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
    with refused("sheet"):
        write_sheet(report.tiles, tmp_path / "sheet.xyz")
    assert [path.name for path in tmp_path.iterdir() if "sheet" in path.name] == ["sheet.png"]


def test_a_sheet_on_a_read_only_disk_is_reported_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, to remove what is not there fails too."""

    def read_only(*args: object, **settings: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Image.Image, "save", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with refused("sheet", "cannot be written: Read-only file system"):
        write_sheet([], tmp_path / "sheet.png")


@pytest.mark.parametrize("changes", [{"size": 0}, {"quality": 101}, {"shard_images": 0}])
def test_plans_that_cannot_be(changes: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(changes.values())))):
        Plan("digits", "train", 10, **changes)


def test_a_file_in_the_way_of_the_records(make_folder: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    for place in ("file", "file/below"):
        with refused("destination", "cannot be made a folder"):
            prepared(make_folder("photos", 2), tmp_path / place)
        with refused("data"):
            RecordSource(str(tmp_path / place))


def test_a_full_disk_is_reported_in_a_sentence(make_folder: Make, tmp_path: Path) -> None:
    """A limit on the size of files stands for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with refused("destination", "images-00000-of-00001.array_record cannot be written: ", "File too large"):
            prepared(make_folder("photos", 3), tmp_path / "records", encoding="raw", size=128)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in (tmp_path / "records").iterdir()) == [".lock", "prepare.json"]


def test_it_does_not_go_on_with_other_files(make_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder("photos", 7)
    with monkeypatch.context() as patch:
        patch.setattr("mae_jax.data.prepare._finish", lambda *arguments: pytest.fail("stopped here"))
        with pytest.raises(pytest.fail.Exception):
            prepared(folder, tmp_path / "records")
    first = next(folder.rglob("000.jpg"))
    first.rename(first.with_name("010.jpg"))
    with refused("destination", "was begun with other files of the same number"):
        prepared(folder, tmp_path / "records")
    first.with_name("010.jpg").rename(first)
    assert len(prepared(folder, tmp_path / "records")) == 7


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


def test_a_file_of_storage_is_on_the_disk_when_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So dataset.json does not stand beside shards that a power cut has emptied."""
    order = recorded(monkeypatch)
    (tmp_path / ".a.json.partial").write_text("what a process that was killed has left")
    Storage(str(tmp_path)).write("a.json", b"whole")
    assert order == [str(tmp_path / ".a.json.partial"), REPLACED, str(tmp_path)]
    assert files(tmp_path) == {"a.json": b"whole"}


HOLDING = """
import sys, time
from mae_jax.data.prepare import Plan, prepare
from mae_jax.data.sources.source import open_source

def report(count):
    print("begun", flush=True)
    time.sleep(60)

prepare(open_source("digits", 1), Plan("digits", "train", 1797, channels=1, size=8), sys.argv[1], 0, report)
"""


def test_two_processes_do_not_write_to_one_folder(tmp_path: Path) -> None:
    source, plan = open_source("digits", 1), Plan("digits", "train", 1797, channels=1, size=8)
    other = subprocess.Popen([sys.executable, "-c", HOLDING, tmp_path / "records"], stdout=subprocess.PIPE, cwd=ROOT)
    assert other.stdout is not None
    assert other.stdout.readline() == b"begun\n"
    with refused("destination", f"process {other.pid} on {socket.gethostname()}"):
        prepare(source, plan, str(tmp_path / "records"), 0, lambda count: None)
    other.kill()
    other.communicate()
    prepare(source, plan, str(tmp_path / "records"), 0, lambda count: None)
    assert not [name for name in files(tmp_path / "records") if name.startswith(".")]


@pytest.mark.parametrize("address", ["records", "memory://ended-meanwhile"])
def test_what_another_process_has_ended_meanwhile_is_not_touched(
    make_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """It ends after this one has found the folder empty, and before this one holds it."""
    folder = make_folder("photos", 4)
    destination = address if "://" in address else str(tmp_path / address)
    ended: list[dict[str, bytes]] = []

    def contents() -> dict[str, bytes]:
        storage = Storage(destination)
        return {name: storage.read(name) for name in storage.names() if not name.startswith(".")}

    def names_read_late(source: Source) -> str:
        monkeypatch.undo()
        prepared(folder, destination, size=32)
        ended.append(contents())
        return "of the same files"

    monkeypatch.setattr("mae_jax.data.prepare._fingerprint", names_read_late)
    with refused("destination", "holds prepared records already"):
        prepared(folder, destination, size=16)
    assert [contents()] == ended


def test_a_plan_elsewhere_is_claimed_once(make_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no lock: whoever comes second, and has seen an empty folder, finds the plan of the first."""
    folder = make_folder("photos", 4)
    with monkeypatch.context() as patch:
        patch.setattr("mae_jax.data.prepare._finish", lambda *arguments: pytest.fail("stopped here"))
        with pytest.raises(pytest.fail.Exception):
            prepared(folder, "memory://claimed")
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "has", lambda storage, name: False)
        patch.setattr(Storage, "names", lambda storage: [])
        with refused("destination", "was begun with size 32; this command has size 16"):
            prepared(folder, "memory://claimed", size=16)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"nothing", b"[]", b'{"size": ' + b"9" * 5000 + b"}"])
def test_a_plan_that_cannot_be_read(make_folder: Make, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records/prepare.json").write_bytes(content)
    with refused("destination"):
        prepared(make_folder("photos", 2), tmp_path / "records")


def test_nothing_is_made_in_the_temporary_directory(
    make_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is killed would leave it there."""
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *args, **settings: pytest.fail("a folder is made"))
    prepared(make_folder("photos", 2), tmp_path / "records")


def test_a_picture_longer_than_jpeg_holds_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("L", (70_000, 40), 9).save(folder / "long.png")
    Image.new("L", (100, 100), 9).save(folder / "square.png")
    records = prepared(folder, tmp_path / "jpeg")
    assert len(records) == 2  # shrunk to 56,000
    records = prepared(folder, tmp_path / "jpeg 64", size=64)
    assert len(records) == 1
    (line,) = records.manifest.broken
    assert "long.png does not decode: JPEG holds 65,500 pixels a side, and this would have 70,000" in line
    assert len(prepared(folder, tmp_path / "raw", size=64, encoding="raw")) == 2
