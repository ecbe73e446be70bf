"""The two sides agree at every stage, for every choice that a configuration offers."""

import json
import subprocess
import sys
from typing import Literal, get_args, get_origin, get_type_hints

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mae_jax.config import MODELS, ModelConfig
from parity import bounds, command
from parity.bounds import Pair
from parity.models import SMALL
from parity.sides import Reference
from parity.stages import STAGES, run
from tests.quick import as_users_compile


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_every_stage_agrees(precision):
    # In float32 two show what all would: that nothing is computed in less. The command compares them all.
    models = SMALL if precision == "float64" else {name: SMALL[name] for name in ("tiny", "tiny_ablations")}
    references = [Reference(config, precision, name=name) for name, config in models.items()]
    results = [result for stage in run(references) for result in stage]
    assert [result for result in results if not result.passed] == []
    stages = {result.stage for result in results}
    assert {"noise", "mixed precision", "gradient decoder_pred", "training run", "fine-tuning"} <= stages


def test_every_choice_of_a_model_is_compared():
    """Whatever a configuration offers, some small model has it."""
    compared = SMALL.values()
    for field, hint in get_type_hints(ModelConfig).items():
        if get_origin(hint) is Literal and field not in ("dtype", "attention"):
            assert {getattr(model, field) for model in compared} == set(get_args(hint)), field
        if hint is bool:
            assert {getattr(model, field) for model in compared} == {True, False}, field
    assert len({model.mask_ratio for model in compared}) >= 4
    assert {model.in_channels for model in compared} > {1, 3}


def test_a_run_leaves_jax_as_it_was():
    before = jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision
    for _ in run([Reference(SMALL["tiny"], "float64")], ["patchify"]):
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
    assert list(STAGES)[-4:] == ["classifier", "probing", "sweep", "finetuning"]


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
    monkeypatch.setitem(bounds.BOUNDS, "forward", bounds.Bound(-1.0, -1.0, 0.0, 0.0, "nothing passes"))
    stages = ["patchify", "latent", "loss"]
    monkeypatch.setattr(sys, "argv", ["parity", "--dtype", "float64", "--report", str(tmp_path), "--stages", *stages])
    assert command.main() == 1
    assert "The first stage that departs is 'latent', tensor 'tiny: whole pass'" in capsys.readouterr().out
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


@pytest.mark.parametrize("name", bounds.BOUNDS)
def test_no_bound_is_wide(name):
    """At most ten times the largest error that is seen, or one rounding where that is larger."""
    bound = bounds.BOUNDS[name]
    for precision in ("float64", "float32"):
        rounding = 2.0**-23 if name == "table" else bounds.ROUNDING[precision]
        assert bound.seen(precision) <= bound.at(precision)
        assert name == "exact" or bound.at(precision) <= max(10 * bound.seen(precision), rounding)


def test_an_error_within_a_stage_is_a_row_of_it(monkeypatch):
    def fails(*_args):
        raise ArithmeticError("no such number")

    monkeypatch.setattr("mae_jax.models.patches.patchify", fails)
    (results,) = run([Reference(SMALL["tiny"], "float64")], ["patchify"])
    assert [(result.stage, result.passed) for result in results] == [("patchify", False)]
    assert results[0].fault == "stopped by ArithmeticError: no such number"


def test_gradients_are_listed_from_the_loss_backwards():
    (results,) = run([Reference(SMALL["tiny"], "float64")], ["gradients"])
    stages = list(dict.fromkeys(result.stage for result in results))
    decoder = ["decoder_pred", "decoder_norm", "decoder_blocks.1", "decoder_blocks.0", "mask_token", "decoder_embed"]
    encoder = ["norm", "blocks.1", "blocks.0", "cls_token", "patch_embed"]
    assert stages == [f"gradient {part}" for part in (*decoder, *encoder)]


def test_it_stops_at_the_first_departure(monkeypatch, capsys):
    monkeypatch.setitem(bounds.BOUNDS, "exact", bounds.Bound(-1.0, -1.0, 0.0, 0.0, "nothing passes"))
    monkeypatch.setattr(sys, "argv", ["parity", "--model", "tiny", "--stop-at-first", "--stages", "patchify", "loss"])
    assert command.main() == 1
    printed = capsys.readouterr().out
    assert "unpatchify" in printed
    assert "loss" not in printed
    assert "float32" not in printed


def test_a_device_that_is_not_there_is_named(capsys):
    arguments = [sys.executable, "-m", "parity", "--device", "gpu"]
    if jax.default_backend() != "cpu":
        pytest.skip("there is one")
    done = subprocess.run(arguments, capture_output=True, text=True, env=as_users_compile(), check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("--device gpu: JAX finds none here")
