"""The two sides agree at every stage, for every choice that a configuration offers."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mae_jax.config import MODELS, ModelConfig, TransformerConfig
from parity import __main__ as command
from parity import bounds
from parity.bounds import Pair
from parity.input_stages import INPUTS
from parity.models import SMALL, TARGETS
from parity.sides import Reference
from parity.stages import STAGES, run
from parity.transfer import TRANSFER
from tests.quick import as_users_compile

PRETRAINING = [name for name, stage in STAGES.items() if stage not in (*INPUTS, *TRANSFER)]

ENCODER, DECODER = TransformerConfig(32, 2, 2), TransformerConfig(24, 1, 3)
VARIANTS = {
    "sincos1d, no class token, grid mask, 1 channel": ModelConfig(
        16, (2, 4), 1, ENCODER, DECODER, positions="sincos1d", class_token=False, masking="grid", norm_pix_loss=True
    ),
    "learned, block mask, 12 channels, other ratio": ModelConfig(
        (12, 20), 4, 12, ENCODER, DECODER, positions="learned", masking="block", mask_ratio=0.6
    ),
    "encoder sees mask tokens, class token, 4 channels": ModelConfig(
        16, (4, 2), 4, ENCODER, DECODER, encoder_mask_tokens=True, mask_ratio=0.5
    ),
    "loss on all, normalised": ModelConfig((8, 24), 4, 3, ENCODER, DECODER, loss_on="all", norm_pix_loss=True),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products are no work for two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("name", SMALL | TARGETS)
def test_every_stage_agrees(name, precision):
    stages = list(STAGES) if name == "tiny" or (name, precision) == ("tiny_ablations", "float64") else PRETRAINING
    results = [result for stage in run(Reference((SMALL | TARGETS)[name], precision), stages) for result in stage]
    assert [result for result in results if not result.passed] == []
    assert {"noise", "mixed precision", "gradient decoder_pred", "training run"} <= {r.stage for r in results}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_choice_agrees(name):
    """What depends on the model: all up to its gradients."""
    skipped = {"noise", "mixed_precision", "learning_rate", "update", "gradients_on_devices", "training"}
    stages = [stage for stage in PRETRAINING if stage not in skipped]
    results = [result for stage in run(Reference(VARIANTS[name], "float64"), stages) for result in stage]
    assert [result for result in results if not result.passed] == []
    assert {"latent", "loss", "gradient decoder_pred", "parameter groups"} <= {result.stage for result in results}


def test_a_run_leaves_jax_as_it_was():
    before = jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision
    for _ in run(Reference(SMALL["tiny"], "float64"), ["patchify"]):
        assert (jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision) == before


def test_stages_are_in_the_order_data_flows():
    order = [
        "order",
        "host_crops",
        "patchify",
        "position_tables",
        "masks",
        "encoder_blocks",
        "latent",
        "decoder_blocks",
        "loss",
        "gradients",
    ]
    assert [name for name in STAGES if name in order] == order
    assert list(STAGES)[-3:] == ["classifier", "probing", "finetuning"]


@pytest.mark.parametrize(
    ("ours", "theirs", "fault"),
    [
        (np.float32([1, 2]), np.float64([1, 2]), "computed in float32"),
        (np.ones(2), np.ones((2, 1)), "shape (2,), reference (2, 1)"),
        (np.ones(0), np.ones(0), "nothing to compare"),
        (np.array([1, np.nan]), np.ones(2), ""),
        (np.array([1, 1 + 1e-12]), np.ones(2), ""),
    ],
)
def test_what_cannot_pass(ours, theirs, fault):
    result = bounds.compare(Pair("stage", "tensor", ours, theirs, "stage"), "float64")
    assert not result.passed
    assert result.fault == fault


def test_relative_error_is_of_the_largest_value():
    result = bounds.compare(Pair("stage", "tensor", np.array([0.5, 8]), np.array([0.0, 10]), "stage"), "float64")
    assert (result.max_abs, result.max_rel) == (2.0, 0.2)


def test_command_reports_agreement(tmp_path):
    """As users run it: a process of its own, compiled with every optimisation."""
    stages = ["patchify", "encoder_blocks", "loss", "gradients", "update"]
    arguments = [sys.executable, "-m", "parity", "--stages", *stages, "--report", str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=as_users_compile(), check=False)
    assert done.returncode == 0, done.stderr
    assert "encoder block 1" in done.stdout
    reports = json.loads((tmp_path / "parity.json").read_text())
    assert [(report["precision"], report["passed"]) for report in reports] == [("float64", True), ("float32", True)]
    assert (tmp_path / "parity.md").read_text().count("| encoder block 1 |") == 2
    assert (tmp_path / "parity.png").stat().st_size > 10_000


def test_command_names_the_first_departure(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(bounds.BOUNDS, "forward", bounds.Bound(-1.0, -1.0, "nothing passes"))
    stages = ["patchify", "latent", "loss"]
    monkeypatch.setattr(sys, "argv", ["parity", "--dtype", "float64", "--report", str(tmp_path), "--stages", *stages])
    assert command.main() == 1
    assert "The first stage that departs is 'latent', tensor 'whole pass'" in capsys.readouterr().out
    (report,) = json.loads((tmp_path / "parity.json").read_text())
    assert report["first_departure"]["stage"] == "latent"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "patchfy"], "patchfy"),
        (["--batch-size", "3"], "--batch-size 3"),
        (["--seed", "-1"], "--seed -1"),
        (["--model", "vit"], "vit_base_patch16"),
    ],
)
def test_wrong_usage(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["parity", *arguments])
    try:
        code = command.main()
    except SystemExit as left:
        code = left.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_every_published_size_can_be_named():
    assert MODELS.keys() <= command.MODELS.keys()
