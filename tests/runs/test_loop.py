"""What happens between steps, seen from inside."""

import dataclasses
import json
import signal

import pytest

from mae_jax.runs import loop, run
from mae_jax.runs.pretrain import Pictures, pretrain


def test_a_row_counts_all_of_its_steps(tiny, tmp_path, monkeypatch):
    """Also those before a checkpoint that falls between two rows."""
    monkeypatch.setattr(loop.Window, "rates", lambda window, batch_size: {"counted": window.steps * batch_size})
    config = dataclasses.replace(
        tiny(), steps=6, log_every=3, save_every=2, reconstruct_every=None, devices=1, workers=0,
        workdir=str(tmp_path / "run"),
    )  # fmt: skip
    pretrain(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["counted"]) for row in rows] == [(3, 48), (6, 48)]


def test_a_stopped_run_draws_no_picture(tiny, tmp_path, monkeypatch):
    """Whoever stops it waits for the checkpoint alone."""
    drawn = []
    monkeypatch.setattr(Pictures, "after", lambda pictures, run, step, state, last: drawn.append(step))

    class AtOnce(run.StopRequest):
        def after(self, step):
            self.signal = signal.SIGTERM
            return True

    monkeypatch.setattr(run, "StopRequest", AtOnce)
    config = dataclasses.replace(
        tiny(), steps=6, reconstruct_every=1, devices=1, workers=0, workdir=str(tmp_path / "run")
    )
    assert pretrain(config).step == 1
    assert drawn == []
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()


@pytest.mark.parametrize(("at", "ended_by"), [(6, signal.SIGTERM), (None, None)])
def test_a_signal_during_the_last_step_is_told(tiny, tmp_path, monkeypatch, at, ended_by):
    """For what comes after it was left out; the same command makes up for it."""
    drawn = []
    monkeypatch.setattr(Pictures, "after", lambda pictures, run, step, state, last: drawn.append(step))

    class At(run.StopRequest):
        def after(self, step):
            self.signal = signal.SIGTERM if step == at else None
            return step == at

    monkeypatch.setattr(run, "StopRequest", At)
    config = dataclasses.replace(
        tiny(), steps=6, reconstruct_every=None, devices=1, workers=0, workdir=str(tmp_path / "run")
    )
    finished = pretrain(config)
    assert (finished.step, finished.signal) == (6, ended_by)
    assert (6 in drawn) == (at is None)
