"""What a benchmark starts ends with it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mae_jax.bench.run import finish, hold, signals_wait
from mae_jax.cli.__main__ import end_by_exception
from mae_jax.errors import StatedError
from tests.processes import dies

PARENT = """
import os, signal, subprocess, sys, time
quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], **quiet)
print(child.pid, file=open(sys.argv[1] + ".part", "w"), flush=True)
os.rename(sys.argv[1] + ".part", sys.argv[1])
if sys.argv[2] == "stays":
    time.sleep(300)
"""


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_waits_until_what_is_started_is_in_hand(number: signal.Signals, raised: type[BaseException]) -> None:
    before = signal.getsignal(number)
    started = []

    def start() -> None:
        with signals_wait():
            signal.raise_signal(number)
            started.append("a process")

    end_by_exception(number)
    try:
        with pytest.raises(raised):
            start()
        assert started == ["a process"]
        with pytest.raises(raised):  # and no longer than that
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("what", ["stays", "ends"])
def test_with_a_job_ends_all_that_it_started(what: str, tmp_path: Path) -> None:
    told = tmp_path / "child"
    done = finish([sys.executable, "-c", PARENT, str(told), what], {}, 0.1)
    assert done.returncode == (1 if what == "stays" else 0)
    assert dies(int(told.read_text()))


def test_a_folder_is_held_until_the_last_job_has_ended(tmp_path: Path) -> None:
    """Also by one that was left when the command was killed."""
    lock = hold(tmp_path)
    with pytest.raises(StatedError, match=f"^{tmp_path} is in use by another command, or by a job that one left"):
        hold(tmp_path)
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], pass_fds=(lock,))
    os.close(lock)
    with pytest.raises(StatedError, match="is in use"):
        hold(tmp_path)
    left.kill()
    left.wait()
    os.close(hold(tmp_path))


def test_a_job_is_given_the_lock(tmp_path: Path) -> None:
    lock = hold(tmp_path)
    has = f"import os; print(os.path.samefile('/proc/self/fd/{lock}', {str(tmp_path / 'lock')!r}))"
    assert finish([sys.executable, "-c", has], lock=lock).stdout == "True\n"
    os.close(lock)
