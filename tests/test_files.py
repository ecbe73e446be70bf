"""A file is written whole or not at all."""

import errno
import os
from pathlib import Path

import pytest
from PIL import Image

from mae_jax.errors import StatedError
from mae_jax.files import check_picture, read_json, save_picture, write_atomically
from tests.refusals import refused


def test_what_was_there_stays_where_there_is_no_room(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "words.txt"
    write_atomically(file, "before")
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "after")
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_read_only_disk_is_said_in_a_sentence(tmp_path, monkeypatch):
    """There, to remove what is not there fails too."""

    def read_only(*args, **settings):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Image.Image, "save", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(StatedError, match=r"out .*a\.png cannot be written: Read-only file system$"):
        save_picture(Image.new("RGB", (4, 4)), tmp_path / "a.png")


def test_an_ending_that_names_no_kind_of_picture_is_said(tmp_path):
    with pytest.raises(StatedError, match=r"the sheet .*a\.nothing cannot be written: unknown file extension"):
        save_picture(Image.new("RGB", (4, 4)), tmp_path / "a.nothing", "the sheet")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_could_not_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "folder.png").mkdir()
    check_picture(tmp_path / "a.JPG")
    for path, said in (
        (tmp_path / "a", "no ending of a picture"),
        (tmp_path / "a.xyz", "no ending of a picture"),
        (tmp_path / "folder.png", "is a folder: choose another name"),
        (tmp_path / "none" / "a.png", "none is no folder that can be written to"),
    ):
        with pytest.raises(StatedError, match=f"^sheet {path} .*{said}"):
            check_picture(path, "sheet")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
        (b"[" + b"9" * 5000 + b"]", "is not JSON: Exceeds the limit"),
        (b"[1, 2", "is not JSON: "),
        (b"", "is not JSON: "),
        (b"\xff\xfe\xfd", "is not JSON: "),
        (b"[" + b"1, " * 400_000 + b"1]", "has more than 1,000,000 bytes"),
    ],
    ids=["lists", "objects", "digits", "cut short", "empty", "not text", "large"],
)
def test_json_of_any_origin_is_read_within_bounds(tmp_path, content, words):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with refused("a.json", str(file), words):
        read_json(file, "a.json", limit=1_000_000)
    file.write_text('{"a": [1, null, "b"]}')
    assert read_json(file) == {"a": [1, None, "b"]}
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")


def test_an_endless_file_is_read_within_bounds():
    with refused(None, "/dev/zero"):
        read_json(Path("/dev/zero"), limit=1000)
