"""Worker processes end with their owner, however it ends, and without a word.

Each test runs a program of its own with two workers, in its own process group as from a terminal.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PROGRAM = """
import multiprocessing, os, signal, sys, time
from mae_jax import ModelConfig, PretrainConfig, StatedError
from mae_jax.data.pipeline import training_batches
from mae_jax.data.sources import open_source

def main(folder):
    config = PretrainConfig(model=ModelConfig(image_size=224), batch_size=32, workers=2)
    batches = training_batches(open_source(f"folder:{folder}", 3), config)
    ENDING

if __name__ == "__main__":
    main(sys.argv[1])
"""

READ = """
    next(batches)
    print("workers", *(child.pid for child in multiprocessing.active_children()), flush=True)
"""
READ_ON = (
    READ
    + """
    for batch in batches:
        pass
"""
)


@contextmanager
def program(tmp_path: Path, folder: Path, ending: str) -> Iterator[subprocess.Popen[str]]:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.replace("    ENDING\n", ending))
    command = [sys.executable, "-W", "error", str(script), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def worker_pids(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("workers"), process.stderr.read() if process.stderr else ""
    pids = [int(pid) for pid in line.split()[1:]]
    assert len(pids) == 2
    return pids


def ended(process: subprocess.Popen[str], pids: list[int], within: float = 10) -> tuple[str, str]:
    """What the program printed, once it and its workers are gone."""
    output = process.communicate(timeout=within)
    deadline = time.monotonic() + within
    while any(_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their owner"
        time.sleep(0.05)
    return output


def _running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


@pytest.mark.parametrize(
    "ending",
    [
        pytest.param(READ + "    batches.close()\n    print(multiprocessing.active_children())\n", id="closed"),
        pytest.param(READ + "    del batches\n    print(multiprocessing.active_children())\n", id="dropped"),
        pytest.param(READ + "    globals().update(batches=batches)\n    print([])\n", id="left open at exit"),
        pytest.param("    batches.close()\n    print('workers 1 2')\n    print([])\n", id="closed at once"),
        pytest.param(
            """
    with batches:
        for _, batch in zip(range(40), batches):
            pass
        print("workers", *(child.pid for child in multiprocessing.active_children()), flush=True)
    print(multiprocessing.active_children())
""",
            id="used for a while",
        ),
    ],
)
def test_normal_ends_are_silent(tmp_path: Path, make_folder: Callable[..., Path], ending: str) -> None:
    with program(tmp_path, make_folder("photos", 40), ending) as process:
        pids = [] if "workers 1 2" in ending else worker_pids(process)
        out, err = ended(process, pids, within=30)
    assert (process.returncode, out.splitlines()[-1], err) == (0, "[]", "")


def test_an_exception_shows_itself_alone(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    with program(tmp_path, make_folder("photos", 40), READ + "    raise KeyError('mine')\n") as process:
        _, err = ended(process, worker_pids(process))
    assert process.returncode == 1
    assert err.count("Traceback") == 1
    assert err.endswith("KeyError: 'mine'\n")


CTRL_C = """
    try:
        with batches:
            READ
    except KeyboardInterrupt:
        print("stopped", flush=True)
"""


@pytest.mark.parametrize("wait", [0.0, 0.3, 1.0])
def test_ctrl_c_reaches_the_owner_alone(tmp_path: Path, make_folder: Callable[..., Path], wait: float) -> None:
    """Also while the workers still start."""
    lines = 'print("started", flush=True)\n            list(batches)'
    with program(tmp_path, make_folder("photos", 40), CTRL_C.replace("READ", lines)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(wait)
        os.killpg(process.pid, signal.SIGINT)
        out, err = ended(process, [])
    assert (process.returncode, out, err) == (0, "stopped\n", "")


HANDLED = """
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    next(batches)
    print("workers", *(child.pid for child in multiprocessing.active_children()), flush=True)
    with batches:
        while not stop:
            next(batches)
        for _ in range(20):
            next(batches)
    print("stopped", flush=True)
"""


def test_sigterm_to_the_group_leaves_the_workers_to_the_owner(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    """As a cluster sends it to every process of a job: the owner still wants batches while it winds up."""
    with program(tmp_path, make_folder("photos", 40), HANDLED) as process:
        pids = worker_pids(process)
        os.killpg(process.pid, signal.SIGTERM)
        out, err = ended(process, pids)
    assert (process.returncode, out, err) == (0, "stopped\n", "")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_an_owner_that_is_killed_takes_its_workers_along(
    tmp_path: Path, make_folder: Callable[..., Path], how: signal.Signals
) -> None:
    with program(tmp_path, make_folder("photos", 40), READ_ON) as process:
        pids = worker_pids(process)
        process.send_signal(how)
        _, err = ended(process, pids)
    # Python's own resource tracker frees the shared memory that was in use, and says so.
    assert "Traceback" not in err
    for name in re.findall(r"psm_\w+", err):
        assert not os.path.exists(f"/dev/shm/{name}")


KILLED = """
    next(batches)
    worker = multiprocessing.active_children()[0].pid
    os.kill(worker, signal.SIGKILL)
    start = time.monotonic()
    try:
        for batch in batches:
            pass
    except StatedError as error:
        print(error)
    print(time.monotonic() - start)
    print(multiprocessing.active_children())
"""


def test_a_worker_that_is_killed_stops_the_run(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    with program(tmp_path, make_folder("photos", 40), KILLED) as process:
        out, err = ended(process, [], within=30)
    message, seconds, children = out.splitlines()
    assert message.startswith("a worker process that reads images was killed by SIGKILL. If memory ran out, use fewer")
    assert float(seconds) < 6
    assert children == "[]"
    # What the killed worker had in shared memory is freed by the resource tracker, which says so.
    assert "Traceback" not in err


def test_reading_needs_no_model_code(tmp_path: Path) -> None:
    """Workers import what the pipeline imports; jax comes with Grain, the rest must not."""
    code = "import sys, mae_jax.data.pipeline; print({'flax', 'optax', 'torch', 'tensorflow'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
