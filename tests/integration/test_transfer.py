"""`mae-jax finetune` and `probe` from the outside."""

import json
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mae_jax.cli.flags import read_flags
from mae_jax.config import FinetuneConfig, PretrainConfig
from mae_jax.presets import transfer
from mae_jax.presets.pretraining import PRESETS
from mae_jax.runs.initial import adopted
from mae_jax.storage.loading import load_any
from mae_jax.storage.workdir import read_record

from .conftest import Run, Start

FAST = ["--batch-size=64", "--log-every=1", "--save-every=100", "--workers=0"]
FINETUNE = [*FAST, "--steps=9", "--optim.warmup-epochs=0.1", "--evaluate-every=0.2"]


def rows(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finetuned(run: Run, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("transfer") / "finetuned"
    done = run("finetune", "digits", f"--init={trained}", *FINETUNE, f"--workdir={workdir}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "the head is new" in done.stdout
    assert "evaluating on 360 other images" in done.stdout
    return workdir


def test_what_a_run_leaves(finetuned: Path) -> None:
    """An evaluation every fifth of an epoch (22.5 steps) and at the end; the best of them; two pictures."""
    scored = [row for row in rows(finetuned) if "top1" in row]
    assert [row["step"] for row in scored] == [5, 9]
    assert all(0 <= row["top1"] <= row["top5"] <= 1 for row in scored)
    assert [row["step"] for row in rows(finetuned) if "loss" in row] == list(range(1, 10))
    (best,) = (finetuned / "best" / "checkpoints").iterdir()
    assert int(best.name) == max(scored, key=lambda row: row["top1"])["step"]
    assert all((finetuned / name).stat().st_size > 1000 for name in ("confusion.png", "worst.png"))


def test_the_encoder_is_the_runs(trained: Path, finetuned: Path) -> None:
    """Its sizes are taken over, and so is how images are normalised."""
    config = load_any(finetuned)[0]
    before = read_record(next((trained / "checkpoints").iterdir())).config
    assert config.model.encoder == before.model.encoder
    assert config.augment.mean == before.augment.mean
    assert config.classes == 10


@pytest.mark.slow
def test_stopped_and_continued_is_never_stopped(
    start: Start, run: Run, trained: Path, finetuned: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "stopped"
    command = ["finetune", "digits", f"--init={trained}", *FINETUNE, f"--workdir={workdir}"]
    process = start(*command)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (workdir / "metrics.jsonl").exists() and len(rows_so_far(workdir)) >= 3:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.02)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 143, err
    assert err.startswith("mae-jax: SIGTERM: stopping after step ")
    done = run(*command)
    assert (done.returncode, done.stderr) == (0, "")
    assert "continuing at step" in done.stdout
    for mine, other in zip(rows(workdir), rows(finetuned), strict=True):
        for name in ("step", "loss", "grad_norm", "top1", "top5", "evaluation_loss"):
            assert mine.get(name) == other.get(name), (name, mine["step"])
    jax.tree.map(np.testing.assert_array_equal, load_any(workdir)[1], load_any(finetuned)[1])
    jax.tree.map(np.testing.assert_array_equal, *(load_any(d / "best")[1] for d in (workdir, finetuned)))


def rows_so_far(workdir: Path) -> list[str]:
    return [line for line in (workdir / "metrics.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.slow
def test_carried_to_pytorch_and_evaluated_from_there(run: Run, finetuned: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    file, best = tmp_path / "classifier.pth", finetuned / "best"
    done = run("port", best, file, "--to=fair")
    assert done.returncode == 0, done.stderr
    assert "10 classes from the mean of the patches" in done.stdout
    step = int(next((best / "checkpoints").iterdir()).name)
    expected = next(row for row in rows(finetuned) if row["step"] == step and "top1" in row)
    for source in (best, file):
        shown = run("finetune", "digits", f"--init={source}", "--eval-only", f"--workdir={tmp_path}/seen")
        assert shown.returncode == 0, shown.stderr
        assert f"top-1 {expected['top1']:.2%}, top-5 {expected['top5']:.2%} of 360 images" in shown.stdout
    assert (tmp_path / "seen" / "evaluated" / "worst.png").exists()
    assert not (tmp_path / "seen" / "config.json").exists()


@pytest.mark.slow
def test_probes_of_several_rates_at_once(run: Run, trained: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "probe"
    sweep = ["--sweep", 1.0, 30.0]
    done = run("probe", "digits", f"--init={trained}", *FAST, "--steps=6", *sweep, f"--workdir={workdir}")
    assert (done.returncode, done.stderr) == (0, "")
    last = rows(workdir)[-1]
    assert last["top1"] == max(last["top1_at_1"], last["top1_at_30"])
    config, params, _ = load_any(workdir / "best")
    assert isinstance(config, FinetuneConfig)
    assert config.sweep == ()
    assert config.optim.base_lr in (1.0, 30.0)
    assert params["head"]["kernel"].shape == (32, 10)
    before = load_any(workdir)[1]["encoder"]
    jax.tree.map(np.testing.assert_array_equal, params["encoder"], before)
    refused = run("port", workdir, tmp_path / "x.pth", "--to=fair")
    assert "holds the heads of a sweep over 2 rates: give its folder best" in refused.stderr
    pytest.importorskip("torch")
    ported = run("port", workdir / "best", tmp_path / "x.pth", "--to=fair")
    assert ported.returncode == 0, ported.stderr
    assert "the probe's BatchNorm is put into its head" in ported.stdout


def test_the_default_of_init_may_be_written_out() -> None:
    """As the list of flags shows it: no weights, and not a file of that name."""
    assert read_flags(["digits", "--init", "None"], "pretrain", PretrainConfig, PRESETS).init is None
    assert read_flags(["digits", "--init", "None"], "finetune", FinetuneConfig, transfer.FINETUNE, adopted).init is None


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["finetune", "digits", "--eval-only"], "init", 1),
        (["finetune", "digits", "--eval-only", "--init", "None"], "init", 1),
        (["finetune", "digits", "--eval-only", "--init={trained}"], "no head", 1),
        (["finetune", "digits", "--init=/nowhere"], "/nowhere", 1),
        (["finetune", "digits", "--init={trained}", "--model.encoder.heads=8"], "4 encoder heads", 1),
        (["finetune", "digits", "--init={trained}", "--last-blocks=3"], "last_blocks 3", 2),
        (["finetune", "digits", "--classes=7"], "classes 7", 1),
        (["finetune", "digits", "--sweep", "1", "2"], "sweep (1.0, 2.0)", 2),
        (["probe", "digits", "--init={trained}", "--accumulate=2"], "accumulate 2", 2),
        (
            ["finetune", "digits", "--mix.mixup=0.8", "--batch-size=33", "--devices=1"],
            "batch_size 33 is not divisible by 2 x 1",
            1,
        ),
        (["pretrain", "digits", "--workdir={finetuned}"], "kind classification", 1),
    ],
)
def test_refusals(refuse: Run, finetuned: Path, trained: Path, arguments: list[str], words: str, code: int) -> None:
    given = [word.format(trained=trained, finetuned=finetuned) for word in arguments]
    if not any("workdir" in word for word in given):
        given.append(f"--workdir={finetuned.parent}/refused")
    done = refuse(*given)
    assert done.returncode == code, done.stderr
    shown = " ".join(done.stderr.replace("│", " ").split())
    assert words in shown
    assert "Traceback" not in done.stderr
