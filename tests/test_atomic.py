"""A file is written whole or not at all."""

import errno
import os

import pytest

from mae_jax.atomic import write_atomically


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
