"""Worker processes end with their owner, however it ends, and without a word.

Each test runs a program of its own with two workers, in its own process group as from a terminal.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import children, dies

PROGRAM = """
import os, signal, sys, time
from mae_jax import ModelConfig, PretrainConfig, StatedError
from tests.processes import children
from mae_jax.data.stream import training_batches
from mae_jax.data.sources.source import open_source

def main(folder):
    config = PretrainConfig(model=ModelConfig(image_size=224), batch_size=32, workers=2)
    batches = training_batches(open_source(f"folder:{folder}", 3), config)
    ENDING

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell put the tests in the background
    main(sys.argv[1])
"""


class Program:
    """PROGRAM with another ending, in a process group of its own; what it prints goes to files."""

    def __init__(self, tmp_path: Path, folder: Path, ending: str) -> None:
        script = tmp_path / "program.py"
        script.write_text(PROGRAM.replace("    ENDING\n", ending))
        self._out, self._err = tmp_path / "out", tmp_path / "err"
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-W", "error", str(script), str(folder)],
                env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

        self._workers: set[int] = set()

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *exception: object) -> None:
        for pid in (self.process.pid, *self._workers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def first_line(self) -> str:
        wait_until(lambda: "\n" in self._out.read_text() or self.process.poll() is not None, 40)
        assert self._out.read_text(), self._err.read_text()
        self._workers |= set(children(self.process.pid))  # they have sessions of their own
        return self._out.read_text().splitlines()[0]

    def signal_group(self, number: int) -> None:
        """As the terminal does on Ctrl-C."""
        os.killpg(self.process.pid, number)

    def ended(self) -> tuple[int, list[str], str]:
        """Exit code, lines printed after the first, and errors, once the program and all it started are gone."""
        code = self.process.wait(timeout=60)
        assert all(dies(pid) for pid in self._workers)
        return code, self._out.read_text().splitlines()[1:], self._err.read_text()


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


CHILDREN = "    print(len(children(os.getpid())))\n"
FIRST = "    next(batches)\n" + CHILDREN
MANY = "    with batches:\n        for _, batch in zip(range(40), batches): pass\n    " + CHILDREN


@pytest.mark.parametrize(
    "ending",
    [
        pytest.param(FIRST + "    del batches\n", id="dropped"),
        pytest.param(FIRST + "    globals().update(kept=batches); return\n", id="left open at exit"),
        pytest.param(
            "    while not children(os.getpid()): pass\n    print(2)\n    batches.close()\n",
            id="closed while workers start",
        ),
        pytest.param(MANY, id="used for a while"),
    ],
)
def test_normal_ends_are_silent(tmp_path: Path, make_folder: Callable[..., Path], ending: str) -> None:
    with Program(tmp_path, make_folder("photos", 40), ending + CHILDREN) as program:
        assert program.first_line() == "2"
        assert program.ended() == (0, [] if "return" in ending else ["0"], "")


def test_an_exception_shows_itself_alone(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    with Program(tmp_path, make_folder("photos", 40), FIRST + "    raise KeyError('mine')\n") as program:
        code, _, err = program.ended()
    assert code == 1
    assert err.count("Traceback") == 1
    assert err.endswith("KeyError: 'mine'\n")


CTRL_C = """
    print("started")
    try:
        with batches:
            list(batches)
    except KeyboardInterrupt:
        print("stopped")
"""


@pytest.mark.parametrize("wait", [0.4, 2.0])
def test_ctrl_c_reaches_the_owner_alone(tmp_path: Path, make_folder: Callable[..., Path], wait: float) -> None:
    """Also while the workers still start."""
    with Program(tmp_path, make_folder("photos", 40), CTRL_C) as program:
        program.first_line()
        time.sleep(wait)
        program.signal_group(signal.SIGINT)
        assert program.ended() == (0, ["stopped"], "")


HANDLED = """
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    next(batches)
    print("started")
    with batches:
        while not stop:
            next(batches)
        for _ in range(20):
            next(batches)
    print("stopped")
"""


def test_sigterm_to_the_group_leaves_the_workers_to_the_owner(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    """As a cluster sends it to every process of a job: the owner still wants batches while it winds up."""
    with Program(tmp_path, make_folder("photos", 40), HANDLED) as program:
        program.first_line()
        program.signal_group(signal.SIGTERM)
        assert program.ended() == (0, ["stopped"], "")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_an_owner_that_is_killed_takes_its_workers_along(
    tmp_path: Path, make_folder: Callable[..., Path], how: signal.Signals
) -> None:
    with Program(tmp_path, make_folder("photos", 40), FIRST + "    for batch in batches: pass\n") as program:
        assert program.first_line() == "2"
        program.process.send_signal(how)
        code, _, err = program.ended()
    assert (code, err) == (-how, "")


KILLED = """
    next(batches)
    os.kill(children(os.getpid())[0], signal.SIGKILL)
    start = time.monotonic()
    print("killed")
    try:
        for batch in batches:
            pass
    except StatedError as error:
        print(error)
    print(time.monotonic() - start)
    print(children(os.getpid()))
"""


def test_a_worker_that_is_killed_stops_the_run(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    with Program(tmp_path, make_folder("photos", 40), KILLED) as program:
        code, (message, seconds, children), err = program.ended()
    assert (code, children) == (0, "[]")
    assert message.startswith("a worker process was killed by SIGKILL. If memory ran out, use fewer --workers")
    assert float(seconds) < 5
    assert err == ""


def test_a_worker_imports_no_more_than_reading_needs() -> None:
    """JAX would take a second of each worker's start, and 150 MB."""
    code = (
        "import sys, mae_jax.data.stream, mae_jax.data.workers\n"
        "print({'jax', 'grain', 'flax', 'optax', 'torch', 'tensorflow', 'matplotlib'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
