"""Runs of classifiers from inside: what they keep."""

import dataclasses

import jax
import numpy as np
import pytest

from mae_jax.config import MixConfig
from mae_jax.errors import StatedError
from mae_jax.evaluation.classify import evaluate_classifier
from mae_jax.hosts import Hosts
from mae_jax.presets.transfer import FINETUNE
from mae_jax.runs.finetune import Evaluations, evaluate, finetune, open_data
from mae_jax.runs.metrics import read_metrics
from mae_jax.storage.checkpoints import save_best
from mae_jax.storage.loading import load_any
from mae_jax.train.build import build_engine, run_length
from tests.refusals import refused


@pytest.fixture
def config(tmp_path):
    whole = FINETUNE["digits"]()
    stack = dataclasses.replace(whole.model.encoder, width=16, depth=1, heads=2)
    return dataclasses.replace(
        whole,
        model=dataclasses.replace(whole.model, patch_size=4, encoder=stack),
        optim=dataclasses.replace(whole.optim, warmup_epochs=0.0, ema_decay=0.5),
        layer_decay=1.0,
        workdir=str(tmp_path / "run"),
        steps=4,
        evaluate_every=0.1,
        devices=1,
        workers=0,
    )


def test_the_best_running_average_is_kept_and_read(config, tmp_path):
    """Evaluated, kept and read back is the average, and it scores what the log says."""
    finetune(config)
    scored = [row for row in read_metrics(tmp_path / "run") if "top1" in row]
    best, params, step = load_any(tmp_path / "run" / "best")
    assert best.optim.ema_decay is None
    expected = max(scored, key=lambda row: row["top1"])
    assert step == expected["step"]
    resolved, _, val = open_data(best)
    engine = build_engine(resolved, run_length(resolved, len(val)))
    found = evaluate_classifier(params, val, resolved, engine.put_rows, 1, Hosts())
    assert found.top(1)[0] == expected["top1"]
    if step == 4:
        newest = load_any(tmp_path / "run")[1]
        jax.tree.map(np.testing.assert_array_equal, params, newest)


def test_neighbours_that_are_mixed_must_stay_in_one_part(config):
    mixed = dataclasses.replace(config, mix=MixConfig(mixup=0.8), batch_size=12, accumulate=4)
    with refused("batch_size", "batch_size 12", "2 x 1 devices x accumulate 4"):
        finetune(mixed)


def test_an_evaluation_that_a_stop_left_out_is_made_up_for(config, tmp_path, monkeypatch):
    """Killed between the last checkpoint and its evaluation."""
    monkeypatch.setattr(Evaluations, "after", lambda *args: None)
    finetune(config)
    assert not any("top1" in row for row in read_metrics(tmp_path / "run"))
    monkeypatch.undo()
    finetune(config)
    (row,) = [row for row in read_metrics(tmp_path / "run") if "top1" in row]
    assert row["step"] == 4
    # Killed before the pictures: they are drawn, and nothing is counted twice.
    (tmp_path / "run" / "worst.png").unlink()
    finetune(config)
    assert (tmp_path / "run" / "worst.png").exists()
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "top1" in row] == [4]


def test_a_run_that_diverges_keeps_its_best(config, tmp_path):
    """Not finite between two looks at the loss: the evaluation ends the run, and `best` is none of its."""
    ruined = dataclasses.replace(config, optim=dataclasses.replace(config.optim, base_lr=1e30), log_every=100, steps=6)
    with refused("optim.base_lr"):
        finetune(ruined)
    assert not any(row.get("top1", 0) == 1 for row in read_metrics(tmp_path / "run"))


def test_best_of_a_later_life_is_dropped(config, tmp_path):
    """A run that goes on before its best checkpoint may come out otherwise."""
    finetune(config)
    for step in (7, 9):
        save_best(tmp_path / "run", step, *load_any(tmp_path / "run" / "best")[:2], Hosts(), None)
    finetune(config)
    assert all(int(path.name) <= 4 for path in (tmp_path / "run" / "best" / "checkpoints").iterdir())


@pytest.mark.parametrize("place", ["drop_later", "save_best"])
def test_what_is_best_is_changed_by_whoever_holds_the_folder(config, tmp_path, monkeypatch, place):
    class Reached(Exception):
        pass

    def reached(*arguments):
        raise Reached(arguments[-1].folder)

    monkeypatch.setattr(f"mae_jax.runs.finetune.{place}", reached)
    with pytest.raises(Reached, match=str(tmp_path / "run")):
        finetune(config)


def test_a_folder_that_cannot_be_written_to_is_known_before_the_evaluation(config, tmp_path, monkeypatch):
    monkeypatch.setattr("mae_jax.runs.finetune.build_engine", lambda *args: pytest.fail("work has begun"))
    (tmp_path / "run").touch()
    with pytest.raises(StatedError, match=rf"workdir {tmp_path}/run cannot be written to \(Not a directory\): choose"):
        evaluate(dataclasses.replace(config, init="weights"))
