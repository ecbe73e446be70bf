"""The picture that is written, or said not to be."""

import errno
import os
from pathlib import Path

import pytest
from PIL import Image

from mae_jax.errors import StatedError
from mae_jax.evaluation.gallery import save_picture


def test_a_read_only_disk_is_said_in_a_sentence(tmp_path, monkeypatch):
    """There, to remove what is not there fails too."""

    def read_only(*args, **settings):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Image.Image, "save", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(StatedError, match=r"out .*a\.png cannot be written: Read-only file system$"):
        save_picture(Image.new("RGB", (4, 4)), tmp_path / "a.png")
