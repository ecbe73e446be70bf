"""`mae-jax pretrain`, `reconstruct` and `knn` from the outside."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mae_jax.data.sources.source import open_source
from mae_jax.evaluation.features import source_features
from mae_jax.storage.loading import load_params

from .conftest import ROOT, TINY, Run, Start


def rows(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_rows_have_the_agreed_keys(trained: Path) -> None:
    found = rows(trained)
    assert [row["step"] for row in found] == list(range(1, 13))
    assert set(found[0]) >= {"step", "loss", "grad_norm", "learning_rate", "images_per_second", "data_wait"}
    assert found[0]["learning_rate"] == 0
    assert all(0 <= row["data_wait"] <= 1 for row in found)
    assert found[-1]["loss"] < found[0]["loss"]


def test_events_hold_losses_and_pictures(trained: Path) -> None:
    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))
    assert sum(len(events.Images(name)) for name in events.Tags()["images"]) == 2


# Prints a line for each file of the library that is loaded and holds more than a docstring: its name and its length.
LOADED = """
import ast, sys
from pathlib import Path
from mae_jax.cli.__main__ import main
code = main()
files = [Path(module.__file__) for name, module in sys.modules.items() if name.partition(".")[0] == "mae_jax"]
for file in files:
    text = file.read_text()
    if not all(isinstance(node, ast.Expr) for node in ast.parse(text).body):
        print("loaded", file, len(text.splitlines()))
sys.exit(code)
"""
FILES, LINES = 45, 6490  # what a new run on one host has loaded at its end; these go down, not up


def test_a_run_on_one_host_loads_what_it_needs(start: Start, tmp_path: Path) -> None:
    arguments = ["pretrain", "digits", *TINY, "--steps=2", "--reconstruct-every=2", f"--workdir={tmp_path}/run"]
    process = start(*arguments, program=("-c", LOADED))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    found = [line.split() for line in out.splitlines() if line.startswith("loaded ")]
    assert len(found) <= FILES, "\n".join(file for _, file, _ in found)
    assert sum(int(lines) for *_, lines in found) <= LINES


def test_same_command_continues_and_changes_nothing(run: Run, trained: Path) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    again = run("pretrain", "digits", *TINY, "--steps=12", f"--workdir={trained}")
    assert again.returncode == 0
    assert "continuing at step 12 of 12" in again.stdout
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_another_configuration_is_refused(refuse: Run, trained: Path) -> None:
    done = refuse(
        "pretrain", "digits", *TINY, "--steps=12", "--model.encoder.depth=3", "--seed=5", f"--workdir={trained}"
    )
    assert done.returncode == 1
    assert "was started with model.encoder.depth 2, not 3, seed 0, not 5." in done.stderr
    assert "Traceback" not in done.stderr


def test_devices_do_not_change_the_losses(run: Run, trained: Path, tmp_path: Path) -> None:
    done = run("pretrain", "digits", *TINY, "--steps=12", f"--workdir={tmp_path}/run", devices=4)
    assert done.returncode == 0, done.stderr
    assert "on 4 x cpu" in done.stdout
    one, four = ([row["loss"] for row in rows(workdir)] for workdir in (trained, tmp_path / "run"))
    np.testing.assert_allclose(four, one, rtol=1e-6)


def test_float64_runs_and_is_read_back(run: Run, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    done = run("pretrain", "digits", *TINY, "--steps=2", "--precision=float64", f"--workdir={workdir}")
    assert (done.returncode, done.stderr) == (0, "")
    loss = rows(workdir)[0]["loss"]
    assert float(np.float32(loss)) != loss
    assert run("reconstruct", workdir, "--samples=2", f"--out={tmp_path}/x.png").returncode == 0


@pytest.mark.slow
def test_folder_of_images_with_a_broken_one(run: Run, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(40):
        file = tmp_path / "images" / "train" / f"class {number % 2}" / f"bild-ä{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        size = random.integers(20, 60, 2)
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(file)
    (tmp_path / "images/train/class 1/broken.jpg").write_bytes(b"not a picture")
    workdir = tmp_path / "run"
    arguments = ["pretrain", "digits", *TINY, f"--data=folder:{tmp_path}/images", "--model.image-size=16"]
    arguments += ["--model.patch-size=4", "--model.in-channels=3", "--augment.mean", 0.5, 0.5, 0.5]
    arguments += ["--augment.std", 0.5, 0.5, 0.5, "--steps=4", "--workers=2", f"--workdir={workdir}"]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("broken.jpg") == 1
    assert rows(workdir)[-1]["broken_files"] == 1
    picture = next((tmp_path / "images").rglob("*ä1.jpg"))
    out = tmp_path / "grid.png"
    assert run("reconstruct", workdir, picture, picture, "--mask-ratio=0.5", f"--out={out}").returncode == 0
    with Image.open(out) as sheet:
        assert sheet.height > 2 * 128
    refused = run("reconstruct", workdir, tmp_path / "images/train/class 1/broken.jpg", f"--out={tmp_path}/no.png")
    assert refused.returncode == 1
    assert "broken.jpg" in refused.stderr
    assert not (tmp_path / "no.png").exists()


def test_a_loss_that_is_not_finite_stops_the_run(run: Run, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    # The rate is 0 at the first step, and then ruins the parameters.
    arguments = ["--steps=30", "--optim.base-lr=1e38", "--optim.warmup-epochs=1", "--save-every=1", "--log-every=10"]
    done = run("pretrain", "digits", *TINY, *arguments, f"--workdir={workdir}")
    assert done.returncode == 1
    assert "is nan at step" in done.stderr or "is inf at step" in done.stderr
    assert f"The last good checkpoint is {workdir}/checkpoints/1." in done.stderr
    config, params, step = load_params(workdir)
    assert step == 1
    found = source_features(params, open_source("digits", 1), config.model, config.augment, "mean")
    assert np.isfinite(found.values).all()


def test_a_warm_up_that_never_ends_is_reported(run: Run, tmp_path: Path) -> None:
    done = run("pretrain", "digits", *TINY, "--steps=1", "--optim.warmup-epochs=3", f"--workdir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert "optim.warmup_epochs 3.0 is longer than the run's" in done.stdout


def test_a_relative_folder_is_found_from_anywhere(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (8, 8), 90).save(tmp_path / "grey.png")
    relative = os.path.relpath(tmp_path, ROOT)  # the commands run in ROOT
    arguments = ["pretrain", "digits", *TINY, f"--data=folder:{relative}", "--steps=1", f"--workdir={tmp_path}/run"]
    assert run(*arguments).returncode == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"] == f"folder:{tmp_path}"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["pretrain", "digits", "--model.mask-ratio=1.5"], 2, "mask_ratio 1.5"),
        (["pretrain", "digits", "--model.encoder.width=65"], 2, "width 65"),
        (["pretrain", "digits", "--stepz", "3"], 2, "Perhaps you meant: --steps"),
        (["pretrain", "nothing"], 2, "digits"),
        (["pretrain", "digits", "--data=folder:/nowhere/at/all"], 1, "/nowhere/at/all"),
        (["pretrain", "digits", "--data=cloud"], 1, "cloud"),
        (["pretrain", "digits", "--devices=9"], 1, "devices 9"),
        (["pretrain", "digits", "--workdir=/proc/nothing"], 1, "/proc/nothing"),
        (["reconstruct", "/nowhere"], 1, "/nowhere"),
        (["knn", "/nowhere"], 1, "/nowhere"),
        (["nonsense"], 2, "nonsense"),
        ([], 2, "COMMAND"),
    ],
)
def test_bad_input_gets_a_sentence(refuse: Run, arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    extra = (
        [f"--workdir={tmp_path}/run"] if arguments[:1] == ["pretrain"] and "workdir" not in "".join(arguments) else []
    )
    done = refuse(*arguments, *extra)
    assert done.returncode == code
    assert words in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_pictures_and_scores_of_a_run(run: Run, trained: Path, tmp_path: Path) -> None:
    done = run("reconstruct", trained / "checkpoints" / "12", f"--out={tmp_path}/grid.png", "--samples=3")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.width > 4 * 128
    refused = run("reconstruct", trained, f"--out={tmp_path}/grid.xyz")
    assert refused.returncode == 1
    assert "grid.xyz" in refused.stderr
    scored = run("knn", trained)
    assert scored.returncode == 0, scored.stderr
    assert "before training" in scored.stdout


def test_help_imports_no_framework() -> None:
    script = (
        "import sys, mae_jax, mae_jax.cli.__main__\n"
        "try: mae_jax.cli.__main__.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('jax', 'flax', 'numpy', 'torch', 'orbax', 'grain', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.endswith("[]\n")
    assert "pretrain" in done.stdout
