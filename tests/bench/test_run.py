"""What `mae-jax bench` refuses before any work, and what a script's exit code is."""

import importlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from mae_jax.bench.run import rows
from mae_jax.errors import StatedError
from tests.refusals import refused


@pytest.mark.parametrize(
    ("batches", "steps", "warmup", "field", "words"),
    [
        ((), 1, 1, "batches", "batches is empty"),
        ((8, 0), 1, 1, "batch", "batch 0 must be positive"),
        ((8, 16), 0, 1, "steps", "steps 0 must be positive"),
        ((8,), 1, 0, "warmup", "warmup 0 must be positive"),
    ],
)
def test_what_cannot_be_timed_is_refused(batches, steps, warmup, field, words):
    with refused(field, words):
        next(rows("digits", batches, "float32", "none", False, "xla", steps, warmup))


def stop(number):
    os.kill(os.getpid(), number)


def state_a_failure():
    raise StatedError("no")


@pytest.mark.parametrize(
    ("main", "code", "errors"),
    [
        (lambda: None, 0, ""),
        (lambda: True, 1, ""),
        (state_a_failure, 1, "no\n"),
        (lambda: stop(signal.SIGINT), 130, ""),
    ],
)
def test_the_exit_code_of_a_script(main, code, errors, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert importlib.import_module("ended").ended(main) == code
        with pytest.raises(SystemExit, match="143"):
            stop(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == errors


def test_a_job_that_outlives_its_command_holds_the_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    bench_gpu = importlib.import_module("bench_gpu")
    given = {}

    def started(command, **options):
        given.update(options)
        return subprocess.CompletedProcess(command, 1, "", "out of memory")

    monkeypatch.setattr(bench_gpu.subprocess, "run", started)
    bench_gpu.run(0, ("Batches", ["bench_step.py", "--model=digits"]), tmp_path, 1.0, 5)
    assert given["pass_fds"] == (5,)
