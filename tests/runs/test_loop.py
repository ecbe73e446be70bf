"""What happens between steps, seen from inside."""

import dataclasses
import json
import signal

import pytest

from mae_jax.runs import loop
from mae_jax.runs.log import RunLog
from mae_jax.runs.pretrain import Pictures, pretrain
from mae_jax.runs.stop import StopRequest


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

    stop = StopRequest()
    stop.request()
    config = dataclasses.replace(
        tiny(), steps=6, reconstruct_every=1, devices=1, workers=0, workdir=str(tmp_path / "run")
    )
    assert pretrain(config, stop=stop).step == 1
    assert drawn == []
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()


@pytest.mark.parametrize(("at", "ended_by"), [(6, signal.SIGTERM), (None, None)])
def test_a_signal_during_the_last_step_is_reported(tiny, tmp_path, monkeypatch, at, ended_by):
    """For what comes after it was left out; the same command makes up for it."""
    drawn = []
    monkeypatch.setattr(Pictures, "after", lambda pictures, run, step, state, last: drawn.append(step))

    stop = StopRequest()
    step_done = RunLog.step_done

    def ask(log):
        step_done(log)
        if stop.step == at:
            stop.request()

    monkeypatch.setattr(RunLog, "step_done", ask)
    config = dataclasses.replace(
        tiny(), steps=6, reconstruct_every=None, devices=1, workers=0, workdir=str(tmp_path / "run")
    )
    finished = pretrain(config, stop=stop)
    assert (finished.step, finished.signal) == (6, ended_by)
    assert (6 in drawn) == (at is None)
