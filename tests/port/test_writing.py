"""What the operating system refuses to write gets a sentence that names the destination, whoever was writing."""

import resource
import shutil

import pytest

import mae_jax
from mae_jax.errors import StatedError

from .conftest import TINY, draw_params

NAMES = {"fair": "a.pth", "timm": "a.safetensors", "huggingface": "hf", "jax": "run"}


@pytest.fixture
def small_files():
    """The operating system lets no file grow beyond 4096 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("layout", NAMES)
def test_what_cannot_be_written_is_named_whole(tmp_path, layout):
    destination = tmp_path / NAMES[layout]
    with pytest.raises(StatedError, match=f"^{destination} cannot be written: .") as raised:
        mae_jax.save_torch(draw_params(TINY), TINY, destination, layout=layout)
    assert "room" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("layout", NAMES)
def test_a_disk_without_room_is_said_to_be_so(tmp_path, monkeypatch, layout):
    used = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: used._replace(free=0))
    said = r"it takes 0\.\d MiB, and its disk has room for 0\.0 MiB\. Make room, or choose a destination"
    with pytest.raises(StatedError, match=f"^{tmp_path / NAMES[layout]} cannot be written: {said}"):
        mae_jax.save_torch(draw_params(TINY), TINY, tmp_path / NAMES[layout], layout=layout)
