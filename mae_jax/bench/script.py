"""How a benchmark ends, and what it leaves: no process that it started, no traceback, no lost table."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from mae_jax.errors import StatedError
from mae_jax.interruption import end_by_exception


def ended(main: Callable[[], int | None]) -> int:
    """Run a script; its exit code, 1 with a sentence for a stated failure, 130 for Ctrl-C, 143 for SIGTERM."""
    end_by_exception(signal.SIGINT, signal.SIGTERM)  # so that whatever this process has started is ended too
    try:
        return main() or 0
    except StatedError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until a process that is being started is in hand, for `Popen` may have started it
    and not yet returned it: an exception in between would leave nobody to end it.
    """
    came: list[int] = []
    with contextlib.ExitStack() as before:  # all are restored, also where the first signal comes in between
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.signal(number, lambda number, frame: came.append(number))
            before.callback(signal.signal, number, signal.SIG_DFL if handler is None else handler)
        yield
    if came:
        signal.raise_signal(came[0])


def hold(folder: Path) -> int:
    """Take a folder for this process and the jobs to which it hands what this returns, until all have ended.

    A job outlives a command that is killed outright, and what runs beside it is not timed as it should be.

    Raises:
      StatedError: another command holds it, or a job that one has left.
    """
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise StatedError(
            f"{folder} is in use by another command, or by a job that one left when it was killed: end it first"
        ) from error
    return lock


def finish(
    command: list[str],
    variables: Mapping[str, str] | None = None,
    minutes: float | None = None,
    lock: int | None = None,
) -> "subprocess.CompletedProcess[str]":
    """A command's end, within `minutes`; with it, or before, ends all that it has started. It has a lock of `hold`."""
    job: subprocess.Popen[str] | None = None
    try:
        with signals_wait():
            job = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | dict(variables or {}),
                start_new_session=True,
                pass_fds=() if lock is None else (lock,),
            )
        out, said = job.communicate(timeout=None if minutes is None else minutes * 60)
        return subprocess.CompletedProcess(command, job.returncode, out, said)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"took longer than {minutes:g} minutes")
    finally:
        if job is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
            job.communicate()


def check_out(path: Path | None) -> None:
    """Refuse a file that cannot be, before any work.

    Raises:
      StatedError: it is a folder, or lies in none.
    """
    if path is None:
        return
    if path.is_dir():
        raise StatedError(f"--out {path} is a folder: name a file")
    if not path.parent.is_dir():
        raise StatedError(f"--out {path}: there is no folder {path.parent}")


def give(text: str, path: Path | None) -> None:
    """Write a table into a file, or print it where there is none, or where it cannot be written.

    Raises:
      StatedError: it could not be written.
    """
    if path is not None:
        try:
            path.write_text(text + "\n")
            return
        except OSError as error:
            print(text, flush=True)
            raise StatedError(f"--out {path} cannot be written ({error.strerror}): the table is printed") from error
    print(text)
