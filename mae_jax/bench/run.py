"""`mae-jax bench`: this project's step alone, over batch sizes, with and without mask tokens in the encoder."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Literal

from mae_jax.bench.recipe import bench_config
from mae_jax.bench.step import matrix_rate, ready_step
from mae_jax.bench.table import HEAD, Figures, caption, factor_line, figures, lacks_memory, line, reason
from mae_jax.config import AttentionKernel, Dtype
from mae_jax.errors import StatedError

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
    """Time one configuration; peak memory is that of this process, so each is to have its own.

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
    about = {"side": side(mask_tokens, attention), "model": model, "remat": remat, "attention": attention}
    about |= {"version": ready.version, "device": ready.device, "matrix_size": rate.size}
    return about | figures(config, seconds, peak, ready.compile_seconds, rate)


def side(mask_tokens: bool, attention: AttentionKernel) -> str:
    """Name a row."""
    return ("jax-cudnn" if attention == "cudnn" else "jax") + (", tokens" if mask_tokens else "")


def in_own_process(
    model: str, batch: int, mask_tokens: bool, attention: AttentionKernel, words: Sequence[str]
) -> Figures:
    """Time one configuration in a process of its own; one that fails leaves a row with the reason."""
    command = [sys.executable, "-m", "mae_jax.cli.__main__", "bench", model, "--batches", str(batch), "--json", *words]
    command.append(f"--mask-tokens={'encoder' if mask_tokens else 'none'}")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.stdout:
        row: Figures = json.loads(done.stdout)
        return row
    return failure(batch, mask_tokens, attention, reason(done.stderr, done.returncode))


def failure(batch: int, mask_tokens: bool, attention: AttentionKernel, why: str) -> Figures:
    """Return the row of what could not be timed."""
    message = why.removeprefix("mae-jax: ").removesuffix(" (--debug shows where)")
    return {"side": side(mask_tokens, attention), "batch": batch, "failed": message}


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
    """Yield a row for each batch, two where mask tokens are compared; too little memory leaves a row as well.

    Raises:
      StatedError: a value is refused.
    """
    variants = {"none": [False], "encoder": [True], "both": [True, False]}[mask_tokens]
    if not batches:
        raise StatedError("batches is empty: give at least one, such as --batches 64", field="batches")
    for name, count in (("steps", steps), ("warmup", warmup)):
        if count < 1:
            raise StatedError(f"{name} {count} must be positive", field=name)
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
    """Print rows as they come, a table or a line of JSON each, and return the exit code: 1 where a row failed."""
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
