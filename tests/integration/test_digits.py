"""What pretraining is worth, on real digits."""

import dataclasses
from pathlib import Path

import pytest

from mae_jax.config import PretrainConfig
from mae_jax.presets import PRESETS, PROBE
from mae_jax.train.finetune import finetune
from mae_jax.train.metrics import read_metrics
from mae_jax.train.pretrain import pretrain


def probed(init: str | None, workdir: Path) -> float:
    """Top-1 of a linear head on a frozen encoder, the recipe as it is."""
    recipe = PROBE["digits"]()
    finetune(dataclasses.replace(recipe, init=init, workdir=str(workdir), workers=0, devices=1, evaluate_every=100.0))
    return [row["top1"] for row in read_metrics(workdir) if "top1" in row][-1]


@pytest.mark.slow
def test_a_probe_gains_by_pretraining(tmp_path: Path) -> None:
    """Both recipes as they are.

    Seeds 0 to 4 gave 83.9 to 90.6 %, on random weights 63.3 to 75.6 %: a gain of 8.3 to 23.6 points.
    """
    recipe: PretrainConfig = PRESETS["digits"]()
    run = tmp_path / "run"
    pretrain(dataclasses.replace(recipe, workdir=str(run), reconstruct_every=None, workers=0, devices=1))
    random, trained = probed(None, tmp_path / "random"), probed(str(run), tmp_path / "trained")
    assert 0.80 < trained < 0.94
    assert 0.57 < random < 0.82
    assert 0.04 < trained - random < 0.30
