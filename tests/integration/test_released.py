"""What version 0.1.0 wrote is evaluated, and continued as if the same version had gone on."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from .conftest import Start

RELEASED = Path(__file__).parents[1] / "golden" / "released" / "0.1.0"
COMMON = ["--batch-size=32", "--steps=8", "--log-every=1", "--save-every=4", "--keep=2"]
ENCODER = ["--model.encoder.width=16", "--model.encoder.depth=2", "--model.encoder.heads=2"]
DECODER = ["--model.decoder.width=8", "--model.decoder.depth=1", "--model.decoder.heads=2"]
COMMANDS = {
    "pretraining": [
        *("pretrain", "digits", *ENCODER, *DECODER),
        *("--optim.warmup-epochs=0.1", "--reconstruct-every=4"),
    ],
    "probe": ["probe", "digits", "--init=pretraining", "--sweep", "0.1", "1.0", "--evaluate-every=0.05"],
    "finetuning": ["finetune", "digits", "--init=pretraining", "--optim.ema-decay=0.9", "--evaluate-every=0.05"],
}


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A copy, to be written to."""
    return Path(shutil.copytree(RELEASED, tmp_path / "released"))


def rows(run: Path) -> dict[int, list[float]]:
    """Loss, gradient norm and learning rate by step."""
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: [row["loss"], row["grad_norm"], row["learning_rate"]] for row in found if "loss" in row}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_goes_on_as_it_went_on_then(start: Start, released: Path, name: str) -> None:
    wanted = rows(released / name)
    process = start(*COMMANDS[name], *COMMON, f"--workdir={name}", cwd=released)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert "continuing at step 4 of 8" in out
    found = rows(released / name)
    assert list(found) == list(range(1, 9))
    for step in range(5, 9):
        np.testing.assert_allclose(found[step], wanted[step], rtol=1e-5)


@pytest.mark.parametrize(
    ("words", "score"),
    [
        (["knn", "pretraining"], 55.98),
        (["knn", "ported"], 56.09),
        (["finetune", "digits", "--init=finetuning", "--eval-only"], 7.78),
        (["finetune", "digits", "--init=probe/best", "--eval-only", "--last-blocks=0", "--batch-norm"], 15.56),
    ],
    ids=["pretraining", "ported", "finetuning", "best head"],
)
def test_it_scores_what_it_scored_then(start: Start, released: Path, words: Sequence[str], score: float) -> None:
    process = start(*words, cwd=released)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    found = re.search(r"([\d.]+)%", out)
    assert found is not None, out
    assert float(found[1]) == pytest.approx(score, abs=0.6)  # two images: another JAX may round otherwise
