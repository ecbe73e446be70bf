"""What cannot be written, by the operating system's or the format's fault, gets a sentence; nothing is left of it."""

import resource
import shutil
from dataclasses import replace

import pytest

import mae_jax
from tests.refusals import refused

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
    with refused("destination", f"{destination} cannot be written: ") as caught:
        mae_jax.save_torch(draw_params(TINY), TINY, destination, layout=layout)
    assert "room" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("layout", NAMES)
def test_a_disk_without_room_is_named(tmp_path, monkeypatch, layout):
    used = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: used._replace(free=0))
    words = f"{tmp_path / NAMES[layout]} cannot be written: it takes 0.", "its disk has room for 0.0 MiB. Make room"
    with refused("destination", *words):
        mae_jax.save_torch(draw_params(TINY), TINY, tmp_path / NAMES[layout], layout=layout)


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
