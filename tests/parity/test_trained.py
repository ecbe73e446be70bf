"""Whatever was trained is compared with what PyTorch would compute of it."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import parity
from mae_jax.config import ClassifierConfig, ModelConfig, TransformerConfig
from mae_jax.models import gradients
from mae_jax.models.blocks import block_class
from mae_jax.models.classifier import Classifier
from mae_jax.models.mae import MaskedAutoencoder
from mae_jax.port.convert import port
from parity import command
from parity.sides import Reference, of_run
from parity.trained import of_params, of_preset, of_source, stages_of
from tests.refusals import refused

RELEASED = Path(__file__).parents[1] / "golden" / "released" / "0.1.0"
STACK = TransformerConfig(16, 1, 2)
BANDS = ModelConfig((12, 20), 4, 12, STACK, TransformerConfig(12, 1, 3), positions="learned", norm_pix_loss=True)
STAGES = ("images", "encoder_blocks", "prediction", "loss", "gradients")


@pytest.fixture(autouse=True)
def _traced_anew():
    """A block that was traced before stays as it was then, whatever is planted."""
    block_class.cache_clear()
    yield
    block_class.cache_clear()


def params_of(config: ModelConfig) -> dict:
    images = jnp.zeros((1, *config.image_hw, config.in_channels))
    return MaskedAutoencoder(config).init(jax.random.key(3), images, jnp.zeros((1, config.num_patches)))["params"]


def bytes_for(config: ModelConfig, count: int = 2) -> np.ndarray:
    shape = (count, *config.image_hw, config.in_channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def run_command(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["parity", *arguments])
    return command.main()


def test_parameters_from_python():
    report = parity.compare(BANDS, params_of(BANDS), bytes_for(BANDS))
    assert report.passed, str(report)
    stages = {result.stage for result in report.results}
    assert {"images", "encoder block 0", "prediction", "loss", "gradient pos_embed"} <= stages
    assert "training run" not in stages
    assert "encoder block 0" in str(report)


def test_the_seed_is_that_of_the_masks():
    images = bytes_for(BANDS)
    drawn = [of_params(BANDS, params_of(BANDS), images, None, seed).given.run.seed for seed in (0, 5)]
    assert drawn == [0, 5]


def test_a_classifier_from_python():
    config = ClassifierConfig(BANDS, classes=3, pooling="class")
    params = Classifier(config).init(jax.random.key(0), jnp.zeros((1, 12, 20, 12)))["params"]
    report = parity.compare(config, params, bytes_for(BANDS))
    assert report.passed, str(report)
    assert [result.stage for result in report.results][-1] == "gradient patch_embed"


def test_a_mistake_is_found_in_somebodys_own_model(monkeypatch):
    monkeypatch.setattr(gradients.jax.lax, "erf", jnp.tanh)
    report = parity.compare(BANDS, params_of(BANDS), bytes_for(BANDS))
    assert report.departure is not None
    assert report.departure.stage == "encoder block 0"


def test_a_file_brings_its_normalisation(tmp_path):
    port(str(RELEASED / "pretraining"), tmp_path / "folder", "huggingface", check=False)
    for source in (RELEASED / "pretraining", tmp_path / "folder"):
        subject = of_source(str(source), None, 2)
        reference = Reference(subject.config, "float64", given=subject.given)
        assert reference.run_config.augment.mean == subject.augment.mean
        assert reference.run_config.augment.std == subject.augment.std


@pytest.mark.parametrize("images", [np.zeros((2, 12, 20, 12)), np.zeros((2, 12, 20, 3), np.uint8)])
def test_images_that_do_not_fit_are_refused(images):
    with refused("images", str(images.shape)):
        parity.compare(BANDS, params_of(BANDS), images)


@pytest.mark.parametrize("name", ["pretraining", "finetuning", "probe/best", "ported"])
def test_what_was_trained(monkeypatch, capsys, name):
    stages = ["--stages", *STAGES] if name in ("pretraining", "ported") else []
    code = run_command(monkeypatch, "--run", str(RELEASED / name), "--data", "digits", "--dtype", "float64", *stages)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "encoder block 0" in printed.out
    assert "all" in printed.out.splitlines()[-2]


@pytest.mark.parametrize("to", ["huggingface", "timm"])
def test_a_file_of_another_library(monkeypatch, capsys, tmp_path, to):
    target = tmp_path / ("folder" if to == "huggingface" else "weights.safetensors")
    port(str(RELEASED / "pretraining"), target, to, check=False)
    stages = ["--stages", *STAGES] if to == "huggingface" else []
    heads = [] if to == "huggingface" else ["--encoder-heads", "2"]
    code = run_command(monkeypatch, "--run", str(target), "--dtype", "float64", *stages, *heads)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert ("there is no decoder" in printed.out) == (to == "timm")
    assert "images are random bytes" in printed.out


def test_a_recipe_brings_its_model_and_its_optimizer():
    subject = of_preset("mnist_tutorial")
    assert subject.given.run is not None
    assert {"training", "update", "gradients"} <= set(stages_of(subject))
    made = of_run(subject.given.run, subject.config, 4)
    assert made.optim.base_lr * made.batch_size == pytest.approx(
        subject.given.run.optim.base_lr * subject.given.run.batch_size
    )
    assert dataclasses.replace(made.optim, base_lr=1.0) == dataclasses.replace(subject.given.run.optim, base_lr=1.0)


def test_images_are_those_of_the_data():
    subject = of_source(str(RELEASED / "pretraining"), "digits", 3)
    assert subject.given.images is not None
    assert subject.given.images.shape == (3, 8, 8, 1)
    assert len(np.unique(subject.given.images)) > 5


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--preset", "nope"], 1, "imagenet_vit_base"),
        (["--run", "/nowhere"], 1, "/nowhere"),
        (["--data", "digits"], 2, "--data digits"),
        (["--encoder-heads", "2"], 2, "--encoder-heads 2"),
        (["--run", str(RELEASED / "finetuning"), "--data", "digits", "--stages", "loss"], 1, "stages loss"),
        (["--run", "x", "--preset", "digits"], 2, "--run and --preset"),
        (["--run", "x", "--peer", "timm"], 2, "--run and --peer"),
    ],
)
def test_what_cannot_be_compared(monkeypatch, capsys, arguments, code, words):
    assert run_command(monkeypatch, *arguments) == code
    assert words in capsys.readouterr().err
