"""`mae-jax bench`: this project's step alone, over batch sizes, with and without mask tokens in the encoder."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from mae_jax.bench.step import bench_config, ready_step
from mae_jax.bench.table import HEAD, Figures, caption, factor_line, figures, lacks_memory, line, matrix_rate, reason
from mae_jax.config import AttentionKernel, Dtype
from mae_jax.errors import StatedError


def ended(main: Callable[[], int | None]) -> int:
    """Run a script; its exit code, 1 with a sentence for a stated failure, 130 for Ctrl-C, 143 for SIGTERM."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that all it has started ends too
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


MaskTokens = Literal["none", "encoder", "both"]


def time_steps(
    model: str,
    batch: int,
    dtype: Dtype,
    steps: int,
    warmup: int,
    mask_tokens: bool = False,
    remat: bool = False,
    attention: AttentionKernel = "xla",
) -> Figures:
    """The figures of one configuration; peak memory is that of this process, so each is to have its own.

    Raises:
      StatedError: a value is refused.
    """
    config = bench_config(model, batch, dtype, mask_tokens, remat, attention)
    ready = ready_step(config)
    for _ in range(warmup):
        ready.step()
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        ready.step()
        seconds.append(time.perf_counter() - began)
    peak = ready.peak_bytes()  # before the large product
    rate = matrix_rate(dtype)
    told = {"side": side(mask_tokens, attention), "model": model, "remat": remat, "attention": attention}
    about = {"version": ready.version, "device": ready.device, "matrix_size": rate.size}
    return told | about | figures(config, seconds, peak, ready.compile_seconds, rate)


def side(mask_tokens: bool, attention: AttentionKernel) -> str:
    """What a row is called."""
    return ("jax-cudnn" if attention == "cudnn" else "jax") + (", tokens" if mask_tokens else "")


def in_own_process(
    model: str, batch: int, mask_tokens: bool, attention: AttentionKernel, words: Sequence[str]
) -> Figures:
    """The same, in a process of its own; one that fails leaves a row that says why."""
    command = [sys.executable, "-m", "mae_jax.cli.__main__", "bench", model, "--batches", str(batch), "--json", *words]
    command.append(f"--mask-tokens={'encoder' if mask_tokens else 'none'}")
    done = finish(command)
    if done.stdout:
        row: Figures = json.loads(done.stdout)
        return row
    return failure(batch, mask_tokens, attention, reason(done.stderr, done.returncode))


def failure(batch: int, mask_tokens: bool, attention: AttentionKernel, why: str) -> Figures:
    """The row of what could not be timed."""
    said = why.removeprefix("mae-jax: ").removesuffix(" (--debug shows where)")
    return {"side": side(mask_tokens, attention), "batch": batch, "failed": said}


def rows(
    model: str,
    batches: Sequence[int],
    dtype: Dtype,
    mask_tokens: MaskTokens,
    remat: bool,
    attention: AttentionKernel,
    steps: int,
    warmup: int,
) -> Iterator[Figures]:
    """One for each batch, two where mask tokens are compared; one that finds too little memory says so.

    Raises:
      StatedError: a value is refused.
    """
    variants = {"none": [False], "encoder": [True], "both": [True, False]}[mask_tokens]
    if not batches:
        raise StatedError("batches is empty: give at least one, such as --batches 64")
    for name, count in (("steps", steps), ("warmup", warmup)):
        if count < 1:
            raise StatedError(f"{name} {count} must be positive")
    for batch in batches:
        for tokens in variants:
            bench_config(model, batch, dtype, tokens, remat, attention)  # refused here, before any work
    if len(batches) * len(variants) == 1:
        try:
            row = time_steps(model, batches[0], dtype, steps, warmup, variants[0], remat, attention)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            if not lacks_memory(why):
                raise
            row = failure(batches[0], variants[0], attention, reason(why, 1))
        yield row
        return
    common = [f"--dtype={dtype}", f"--steps={steps}", f"--warmup={warmup}", f"--attention={attention}"]
    common += ["--remat"] if remat else []
    for batch in batches:
        for tokens in variants:
            yield in_own_process(model, batch, tokens, attention, common)


def show(found: Iterator[Figures], model: str, as_json: bool) -> int:
    """Print rows as they come: a table, or a line of JSON each. The exit code: 1 where a row failed."""
    with_tokens: Figures | None = None
    failed = begun = False
    for row in found:
        failed = failed or "failed" in row
        if as_json:
            print(json.dumps(row), flush=True)
            continue
        if not begun and "failed" not in row:
            print(f"{caption(row)}\n{HEAD}")
            begun = True
        print(line(row), flush=True)
        if "failed" in row or row["mask_tokens"]:
            with_tokens = None if "failed" in row else row
        elif with_tokens is not None:
            print(factor_line(model, with_tokens, row), flush=True)
    return int(failed)
