"""Several real processes as hosts of one run, over this machine's loopback."""

import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import mae_jax
from mae_jax.storage.loading import load_params
from tests.processes import free_port

from .conftest import ROOT, TINY, Run, Start
from .test_pretrain import rows
from .test_resume import has_step, wait_for

STEPS = 40
ARGUMENTS = ["pretrain", "digits", *TINY, f"--steps={STEPS}", "--save-every=5", "--optim.ema-decay=0.9"]
Outcome = list[tuple[int, str, str]]


def start_hosts(
    start: Start, count: int, *args: object, own: Sequence[Sequence[object]] = (), **settings: Any
) -> list[subprocess.Popen]:
    """Start `count` hosts with the same arguments, and those of its own for each."""
    port = free_port()
    common = [*args, f"--coordinator=127.0.0.1:{port}", f"--num-processes={count}"]
    return [start(*common, f"--process-id={host}", *(own[host] if own else ()), **settings) for host in range(count)]


def finish(processes: list[subprocess.Popen]) -> Outcome:
    """Exit code, output and errors of each."""
    try:
        texts = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *pair) for process, pair in zip(processes, texts, strict=True)]


def losses(workdir: Path) -> list[float]:
    found = rows(workdir)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return [row["loss"] for row in found]


def weights(workdir: Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(load_params(workdir)[1])]


def assert_same_run(one: Path, other: Path) -> None:
    np.testing.assert_allclose(losses(other), losses(one), rtol=1e-6)
    assert len(losses(one)) == STEPS


@pytest.fixture(scope="module")
def never_stopped(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On one host and one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    done = run(*ARGUMENTS, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.slow
def test_two_hosts_of_two_devices_compute_what_one_computes(start: Start, never_stopped: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    port = free_port()
    common = [*ARGUMENTS, "--engine=fsdp", "--fsdp=2", "--reconstruct-every=20", f"--workdir={workdir}"]
    common += [f"--coordinator=127.0.0.1:{port}", "--num-processes=2"]
    done = finish([start(*common, f"--process-id={host}", devices=2) for host in (0, 1)])
    assert [code for code, _, _ in done] == [0, 0], done
    assert_same_run(never_stopped, workdir)
    assert "on 2 hosts x 2 x cpu" in done[0][1]
    assert "loss" not in done[1][1]
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert [file.name for file in workdir.glob(".*")] == [".lock"]


@pytest.mark.slow
def test_a_run_that_loses_hosts_again_and_again(start: Start, run: Run, never_stopped: Path, tmp_path: Path) -> None:
    """Two, of which the second gets SIGTERM; two, of which the second is killed; one, to the end."""
    workdir = tmp_path / "run"
    processes = start_hosts(start, 2, *ARGUMENTS, "--engine=fsdp", f"--workdir={workdir}")
    wait_for(lambda: has_step(workdir, 7) or any_ended(processes))
    processes[1].send_signal(signal.SIGTERM)
    saved = assert_stopped_together(finish(processes), workdir)
    assert load_params(workdir)[2] == saved

    newest = cut_newest_short(workdir)
    processes = start_hosts(start, 2, *ARGUMENTS, "--engine=jit", f"--workdir={workdir}")
    wait_for(lambda: has_step(workdir, saved + 10) or any_ended(processes))
    processes[1].kill()
    began = time.monotonic()
    code, out, err = finish(processes)[0]
    assert time.monotonic() - began < 60
    assert f"{newest} is broken and skipped" in out
    assert code == 1
    assert "mae-jax: an operation of all 2 hosts has failed, as it does when one is gone" in err
    assert f"it continues from the newest checkpoint in {workdir}, on fewer hosts if need be" in err

    done = run(*ARGUMENTS, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert "continuing at step" in done.stdout
    assert_same_run(never_stopped, workdir)
    largest = max(np.abs(leaf).max() for leaf in weights(never_stopped))
    for found, expected in zip(weights(workdir), weights(never_stopped), strict=True):
        # The key's bias has no gradient but rounding, which AdamW magnifies (train/test_engines.py).
        assert np.abs(found - expected).max() < (1e-6 if found.ndim > 1 else 1e-2) * largest


def any_ended(processes: list[subprocess.Popen]) -> bool:
    return any(process.poll() is not None for process in processes)


def assert_stopped_together(done: Outcome, workdir: Path) -> int:
    """All at one step, which is the newest that is saved."""
    assert [code for code, _, _ in done] == [143] * len(done), done
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert saved == len(losses(workdir)) < STEPS
    for _, out, err in done:
        assert f"step {saved} is saved" in out
        assert "stopped by SIGTERM; to continue: mae-jax pretrain digits" in out
        assert "Traceback" not in err
    return saved


def cut_newest_short(workdir: Path) -> Path:
    newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    data = max(newest.rglob("d/*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    return newest


def test_one_that_cannot_write_ends(start: Start, tmp_path: Path) -> None:
    """At once, though inside Orbax it would wait for the others; they follow at their next step, or JAX ends them."""
    workdir = tmp_path / "run"
    processes = start_hosts(start, 2, *ARGUMENTS, "--engine=fsdp", f"--workdir={workdir}")
    wait_for(lambda: has_step(workdir, 7) or any_ended(processes))
    hard = resource.prlimit(processes[1].pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(processes[1].pid, resource.RLIMIT_FSIZE, (0, hard))
    try:
        _, err = processes[1].communicate(timeout=60)
    finally:
        processes[0].kill()
    finish(processes[:1])
    assert processes[1].returncode == 1
    # Threads of TensorStore may report the same failure before it.
    assert f"mae-jax: a checkpoint cannot be written into {workdir}/checkpoints: " in err


def test_hosts_that_differ_are_refused(start: Start, tmp_path: Path) -> None:
    """In configuration, in data and in code; every one of them says in what."""
    other = tmp_path / "other"
    shutil.copytree(ROOT / "mae_jax", other / "mae_jax", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "mae_jax" / "rng.py").open("a") as file:
        file.write("# Another version.\n")
    port = free_port()
    common = [*ARGUMENTS, "--engine=jit", f"--workdir={tmp_path}/run"]
    common += [f"--coordinator=127.0.0.1:{port}", "--num-processes=2"]
    first = start(*common, "--process-id=0")
    path = {"PYTHONPATH": str(other)}
    second = start(*common, "--process-id=1", "--seed=5", "--batch-size=64", cwd=other, environment=path)
    for code, _, err in finish([first, second]):
        assert code == 1
        assert "the hosts do not run the same: batch_size: 32 on host 0, 64 on host 1; mae_jax code: " in err
        assert "; seed: 0 on host 0, 5 on host 1. Start all of them alike." in err
        assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_one_that_cannot_start_reports_to_the_others(start: Start, tmp_path: Path) -> None:
    own = [[f"--data=folder:{tmp_path}/nowhere"], []]
    done = finish(start_hosts(start, 2, *ARGUMENTS, "--engine=jit", f"--workdir={tmp_path}/run", own=own))
    assert [code for code, _, _ in done] == [1, 1]
    assert f"{tmp_path}/nowhere" in done[0][2]
    assert f"mae-jax: host 0 of 2 has failed: {done[0][2].splitlines()[-1].removeprefix('mae-jax: ')}" in done[1][2]


INITS = """
import sys
from mae_jax.cli.finetune import _adopt
from mae_jax.cli.flags import read_flags
from mae_jax.config import FinetuneConfig, PretrainConfig
from mae_jax.hosts import joined
from mae_jax.presets.pretraining import PRESETS
from mae_jax.presets.transfer import FINETUNE, PROBE
from mae_jax.runs.finetune import finetune
from mae_jax.runs.pretrain import pretrain

common, tiny, inits, workdirs = (word.split("|") for word in sys.argv[1:])
words = [
    ["digits", f"--init={init}", f"--workdir={workdir}", "--steps=1", "--engine=jit", "--batch-size=32", *common]
    for init, workdir in zip(inits, workdirs)
]
runs = [
    (pretrain, read_flags([*words[0], *tiny], "", PretrainConfig, PRESETS)),
    (finetune, read_flags([*words[1], "--optim.warmup-epochs=0"], "", FinetuneConfig, FINETUNE, _adopt)),
    (finetune, read_flags([*words[2], "--optim.warmup-epochs=0"], "", FinetuneConfig, PROBE, _adopt)),
]
with joined(runs[0][1]) as hosts:
    for train, config in runs:
        print(train(config, hosts))
"""


@pytest.mark.slow
def test_weights_to_start_from(start: Start, never_stopped: Path, tmp_path: Path) -> None:
    """Pretraining from a run, a fine-tuning from one of its checkpoints, a probe from a PyTorch file."""
    pytest.importorskip("torch")
    config, params, _ = load_params(never_stopped)
    mae_jax.save_torch(params, config.model, tmp_path / "fair", layout="fair")
    inits = [never_stopped, never_stopped / "checkpoints" / str(STEPS), *(tmp_path / "fair").glob("*.pth")]
    workdirs = [tmp_path / name for name in ("pretrain", "finetune", "probe")]
    coordinator = f"--coordinator=127.0.0.1:{free_port()}"
    processes = []
    for host in (0, 1):
        common = ["--workers=0", coordinator, "--num-processes=2", f"--process-id={host}"]
        words = ["|".join(map(str, word)) for word in (common, TINY, inits, workdirs)]
        processes.append(start(*words, program=("-c", INITS)))
    done = finish(processes)
    assert [code for code, _, _ in done] == [0, 0], done
    for workdir in workdirs:
        assert (workdir / "checkpoints" / "1").is_dir()
    assert rows(workdirs[0])[0]["loss"] < losses(never_stopped)[0]  # it goes on where the other ended
