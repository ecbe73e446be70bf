"""What cannot be written, by the operating system's or the format's fault, gets a sentence; nothing is left of it."""

import resource
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

import mae_jax
from tests.refusals import refused

from .conftest import TINY, draw_params

NAMES = {"fair": "a.pth", "timm": "a.safetensors", "huggingface": "hf"}


def skip_without_writer(layout):
    """Skip a test of files that PyTorch writes, where it is absent."""
    if NAMES[layout].endswith(".pth"):
        pytest.importorskip("torch")


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
    skip_without_writer(layout)
    destination = tmp_path / NAMES[layout]
    with refused("destination", f"{destination} cannot be written: ") as caught:
        mae_jax.save_torch(draw_params(TINY), TINY, destination, layout=layout)
    assert "room" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("layout", NAMES)
def test_a_disk_without_room_is_named(tmp_path, monkeypatch, layout):
    skip_without_writer(layout)
    used = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: used._replace(free=0))
    words = f"{tmp_path / NAMES[layout]} cannot be written: it takes 0.", "its disk has room for 0.0 MiB. Make room"
    with refused("destination", *words):
        mae_jax.save_torch(draw_params(TINY), TINY, tmp_path / NAMES[layout], layout=layout)


WITHOUT_ROOM = """
import resource, shutil, sys
from pathlib import Path
import mae_jax
from tests.port.conftest import TINY, draw_params
if sys.argv[2] == "without room":
    used = shutil.disk_usage(sys.argv[1])
    shutil.disk_usage = lambda path: used._replace(free=0)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    mae_jax.save_torch(draw_params(TINY), TINY, Path(sys.argv[1]) / "run", layout="jax")
except mae_jax.StatedError as error:
    print(f"{error.field}: {error}")
"""


@pytest.mark.parametrize(("disk", "words"), [("with room", "run"), ("without room", "room for 0.0 MiB. Make room")])
def test_a_checkpoint_that_cannot_be_written_is_named(tmp_path, disk, words):
    """In a process of its own: threads of Orbax end after the failure, and complain."""
    command = [sys.executable, "-c", WITHOUT_ROOM, str(tmp_path), disk]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.stdout.startswith(f"destination: {tmp_path / 'run'} cannot be written: "), done.stderr
    assert words in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "to", "part", "words"),
    [
        ({"positions": "sincos1d"}, "huggingface", "all", "positions sincos1d"),
        ({"class_token": False}, "huggingface", "encoder", "class_token False"),
        ({"class_token": False}, "fair", "all", "class_token False"),
        ({"patch_size": (8, 4)}, "huggingface", "all", "patch_size (8, 4) is not square"),
        ({"image_size": (32, 48)}, "lightly", "all", "image_size (32, 48) is not square"),
        ({"encoder_mask_tokens": True}, "fair", "all", "encoder_mask_tokens True"),
        *(
            ({"pca_components": 5, "norm_pix_loss": False}, to, "all", "pca_components 5, and its decoder predicts")
            for to in ("fair", "huggingface", "lightly", "lightly-deprecated")
        ),
    ],
)
def test_what_a_format_cannot_express_is_refused(tmp_path, changes, to, part, words):
    config = replace(TINY, **changes)
    with refused("to", f"{to} cannot express this model: ", words):
        mae_jax.save_torch(draw_params(config), config, tmp_path / "there", layout=to, part=part)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "to", "words"),
    [
        ("f.safetensors", "fair", "fair cannot be a .safetensors file"),
        ("f.pth", "huggingface", "huggingface is a folder, not a .pth file"),
    ],
)
def test_an_ending_must_be_that_of_the_format(tmp_path, name, to, words):
    with refused("destination", words):
        mae_jax.save_torch(draw_params(TINY), TINY, tmp_path / name, layout=to)


def test_parameters_of_another_model_are_listed(tmp_path):
    with refused("params", "decoder/block_0/norm1/scale is missing"):
        mae_jax.save_torch({"encoder": draw_params(TINY)["encoder"]}, TINY, tmp_path / "f.pth", layout="fair")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["s3://bucket/x.pth", "gs://bucket/folder"])
def test_an_address_is_no_place_to_write_to(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    layout = "fair" if address.endswith("pth") else "huggingface"
    with refused("destination", "is an address"):
        mae_jax.save_torch(draw_params(TINY), TINY, address, layout=layout)
    assert list(tmp_path.iterdir()) == []
