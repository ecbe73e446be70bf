"""A run that is stopped anywhere and continued equals, bit for bit, one that never was."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from mae_jax.storage.loading import load_params
from tests.processes import children, dies

from .conftest import TINY, Run, Start
from .test_pretrain import rows

STEPS = 40
ARGUMENTS = ["pretrain", "digits", *TINY, f"--steps={STEPS}", "--save-every=5", "--optim.ema-decay=0.9"]


def final(workdir: Path) -> tuple[dict[int, tuple[float, float]], list[np.ndarray]]:
    """Loss and gradient norm by step, and the last parameters."""
    numbers = {int(row["step"]): (row["loss"], row["grad_norm"]) for row in rows(workdir)}
    assert len(numbers) == len(rows(workdir)), "a step was written twice"
    return numbers, [np.asarray(leaf) for leaf in jax.tree.leaves(load_params(workdir)[1])]


@pytest.fixture(scope="module")
def never_stopped(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert run(*ARGUMENTS, f"--workdir={workdir}").returncode == 0
    return workdir


def assert_equal_runs(one: Path, other: Path) -> None:
    (numbers, params), (other_numbers, other_params) = final(one), final(other)
    assert other_numbers == numbers
    assert sorted(numbers) == list(range(1, STEPS + 1))
    for a, b in zip(params, other_params, strict=True):
        np.testing.assert_array_equal(a, b)


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.001)


def has_step(workdir: Path, step: int) -> bool:
    file = workdir / "metrics.jsonl"
    return file.exists() and f'"step": {step},' in file.read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stop_by_signal(
    start: Start, run: Run, never_stopped: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    workdir = tmp_path / "run"
    process = start(*ARGUMENTS, f"--workdir={workdir}")
    wait_for(lambda: has_step(workdir, 7))
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert f"stopped by {number.name}; to continue: mae-jax pretrain digits" in out
    assert err.startswith(f"mae-jax: {number.name}: stopping after step ")
    assert len(err.splitlines()) == 1
    stopped_at = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert stopped_at == rows(workdir)[-1]["step"] < STEPS
    assert run(*ARGUMENTS, f"--workdir={workdir}").returncode == 0
    assert_equal_runs(never_stopped, workdir)


NOHUP = """
import runpy, signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
runpy.run_module("mae_jax.cli", run_name="__main__")
"""
TERMINAL = """
import os, pty, runpy, sys, time
process, terminal = pty.fork()
if process == 0:
    runpy.run_module("mae_jax.cli", run_name="__main__")
while not os.path.exists(sys.argv[-1].removeprefix("--workdir=") + "/checkpoints/6"):
    time.sleep(0.1)
os.close(terminal)  # as where a connection by ssh is lost
sys.exit(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


def test_signals_of_clusters_and_terminals(start: Start, tmp_path: Path) -> None:
    """What nohup ignores stays ignored; a terminal may go away; a second signal ends at once, workers too."""
    arguments = [*ARGUMENTS, "--batch-size=512", "--steps=400", "--save-every=6"]
    workdirs = [tmp_path / name for name in ("first", "nohup", "terminal", "twice")]
    programs = [("-m", "mae_jax.cli"), ("-c", NOHUP), ("-c", TERMINAL), ("-m", "mae_jax.cli")]
    flags = [[], [], [], ["--workers=2"]]
    processes = [
        start(*arguments, *own, f"--workdir={workdir}", program=program)
        for workdir, program, own in zip(workdirs, programs, flags, strict=True)
    ]
    first, nohup, _, twice = processes
    try:
        for workdir in workdirs:
            wait_for(lambda workdir=workdir: has_step(workdir, 7))  # type: ignore[misc]
        first.send_signal(signal.SIGUSR2)
        nohup.send_signal(signal.SIGHUP)
        nohup.send_signal(signal.SIGUSR1)
        twice.send_signal(signal.SIGINT)
        assert twice.stderr is not None
        answer = twice.stderr.readline()
        workers = children(twice.pid)
        twice.send_signal(signal.SIGINT)
        texts = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [140, 138, 129, 130], texts
    for workdir in workdirs[:3]:
        assert rows(workdir)[-1]["step"] in checkpoints(workdir)
    assert answer.startswith("mae-jax: SIGINT: stopping after step ")
    newest = max({0, *checkpoints(workdirs[3])})
    assert newest < rows(workdirs[3])[-1]["step"]
    assert f"mae-jax: SIGINT: ended at once; what is since step {newest} is lost" in texts[3][1]
    assert "is saved" not in texts[3][0]
    assert len(workers) == 2
    assert all(map(dies, workers))


def checkpoints(workdir: Path) -> set[int]:
    return {int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}


def test_killed_in_the_middle_of_a_save(start: Start, run: Run, never_stopped: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    process = start(*ARGUMENTS, f"--workdir={workdir}")
    checkpoints = workdir / "checkpoints"
    wait_for(lambda: checkpoints.exists() and any("tmp" in name for name in os.listdir(checkpoints)))
    process.kill()
    process.communicate()
    assert any("tmp" in name for name in os.listdir(checkpoints)), "the save was over before the kill"
    assert run(*ARGUMENTS, f"--workdir={workdir}").returncode == 0
    assert not any("tmp" in name for name in os.listdir(checkpoints))
    assert_equal_runs(never_stopped, workdir)


def test_broken_newest_checkpoint_is_skipped_loudly(
    start: Start, run: Run, never_stopped: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    process = start(*ARGUMENTS, f"--workdir={workdir}")
    wait_for(lambda: has_step(workdir, 17))
    process.terminate()
    process.communicate(timeout=120)
    newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    data = max(newest.rglob("d/*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    done = run(*ARGUMENTS, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert f"{newest} is broken and skipped" in done.stdout + done.stderr
    assert_equal_runs(never_stopped, workdir)
