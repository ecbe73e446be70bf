"""Time this project's training step beside the PyTorch reference's, in turn, each in a process of its own.

    python scripts/bench_step.py --model vit_small_patch16 --batch 16
    python scripts/bench_step.py --model vit_large_patch16 --batch 256 --dtype bfloat16 --against torch,torch-compile
    python scripts/bench_step.py --model vit_large_patch16 --batch 64 128 256 --mask-tokens both --against ''
    python scripts/bench_step.py --model vit_huge_patch14 --dtype bfloat16 --remat --largest-batch

A round is a few steps of one side, then of the other; the order turns round each time, so that a machine whose speed
drifts treats both alike. Reported are medians over all timed steps, and the median of the rounds' ratios. FLOP/s count
the model's definition (mae_jax/models/flops.py), forward + backward as three times forward; their share is of a large
matrix product that this project's side times before the first round. In float32 on a GPU both sides multiply as JAX
does by default, with factors in TF32 where the card has it.

A side that fails, such as for want of memory, leaves a row that says why. Where the sides do not fit beside each other
they are timed one after the other, and the table says so.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_side import SIDES, add_flags
from ended import ended

from mae_jax.bench.recipe import bench_config
from mae_jax.bench.table import (
    HEAD,
    Figures,
    MatrixRate,
    caption,
    factor_line,
    figures,
    lacks_memory,
    line,
    reason,
    warning_of_order,
)
from mae_jax.config import PretrainConfig

SIDE = Path(__file__).with_name("bench_side.py")
PAUSE = 0.3  # seconds between sides: thread pools spin for a while after their work


def batches(text: str) -> list[int]:
    """Read one number or several, commas between them."""
    return [int(number) for number in text.split(",")]


def parse() -> argparse.Namespace:
    """Read the command line, with the standard library alone, since machines for benchmarks are bare."""
    parser = argparse.ArgumentParser(description="The training step beside PyTorch's.")
    add_flags(parser)
    parser.add_argument(
        "--batch", type=batches, nargs="+", default=[[16]], help="several (64 128 or 64,128): a table each"
    )
    parser.add_argument(
        "--against", default="torch", help="comma-separated: torch, torch-compile, jax-cudnn; or nothing"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3, help="timed steps in a round")
    parser.add_argument(
        "--mask-tokens", choices=("none", "encoder", "both"), default="none", help="in the encoder (Table 1c)"
    )
    parser.add_argument(
        "--largest-batch",
        action="store_true",
        help="how large a batch this project's side can take, from --batch on; on a CPU set a limit (ulimit -v) first",
    )
    parser.add_argument("--json", action="store_true", help="print each table as one line of JSON")
    arguments = parser.parse_args()
    arguments.batch = [batch for given in arguments.batch for batch in given]
    return arguments


class SideFailed(Exception):
    """A side ended before it should; the message is the reason."""


class Process:
    """One side in a process of its own; each method raises SideFailed where it has ended."""

    def __init__(self, name: str, words: list[str], alone: bool) -> None:
        self.name = name
        self.about: dict[str, Any] = {}  # version, device, compile_seconds, peak_bytes, matrix
        self.rounds: list[list[float]] = []
        # JAX would take three quarters of a GPU's memory at once, and leave the others none.
        memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} if alone else {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, str(SIDE), name, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | memory,
        )

    def begin(self) -> None:
        """Wait until it is warm."""
        self.about = self._read()

    def round(self, steps: int) -> None:
        """Time some steps."""
        time.sleep(PAUSE)
        try:
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # its errors, which _read finds, are the reason
            pass
        self.rounds.append(self._read())

    def _read(self) -> Any:
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            self._errors.seek(0)
            raise SideFailed(reason(self._errors.read(), code))
        return json.loads(answer)

    def close(self) -> None:
        """End it, whatever it is at."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def timed(names: list[str], config: PretrainConfig, arguments: argparse.Namespace) -> tuple[list[Process], Figures]:
    """Time sides in turn; with them comes the row of the first that failed, which ends the others too, or {}."""
    words = [f"--model={arguments.model}", f"--batch={config.batch_size}", f"--warmup={arguments.warmup}"]
    words += [f"--dtype={config.model.dtype}", *([f"--device={arguments.device}"] if arguments.device else [])]
    words += ["--encoder-mask-tokens"] if config.model.encoder_mask_tokens else []
    words += ["--remat"] if config.model.remat else []
    words += [f"--attention={config.model.attention}"]
    sides, name = [], names[0]
    try:
        for name in names:
            sides.append(Process(name, words, alone=len(names) == 1))
            sides[-1].begin()
        if len({side.about["device"] for side in sides}) > 1:
            found = ", ".join(f"{side.name} on {side.about['device']}" for side in sides)
            raise SystemExit(f"the sides are not on one device ({found}): give --device cpu or gpu")
        for number in range(arguments.rounds):
            for side in sides if number % 2 == 0 else sides[::-1]:
                name = side.name
                side.round(arguments.steps)
    except SideFailed as error:
        about = {"side": name, "model": arguments.model, "batch": config.batch_size}
        return [], about | {"mask_tokens": config.model.encoder_mask_tokens, "failed": str(error)}
    finally:
        for side in sides:
            side.close()
    return sides, {}


def compare(names: list[str], config: PretrainConfig, arguments: argparse.Namespace) -> list[Figures]:
    """Return a row for each side.

    Sides that are there at once share the device's memory: where one finds too little, each is timed alone. One that
    fails otherwise leaves the turns to the rest.
    """
    failures: dict[str, Figures] = {}
    sides: list[Process] = []
    left = list(names)
    while left and not sides:
        sides, failure = timed(left, config, arguments)
        if failure:
            if len(left) > 1 and lacks_memory(failure["failed"]):
                break
            failures[failure["side"]] = failure
            left.remove(failure["side"])
    in_turn = len(sides) > 1
    for name in [] if sides else left:
        alone, failure = timed([name], config, arguments)
        sides += alone
        if failure:
            failures[name] = failure
    done = {side.name: side for side in sides}
    first = done.get(names[0])
    return [
        row_of(done[name], first, config, arguments.model, in_turn) if name in done else failures[name]
        for name in names
    ]


def row_of(side: Process, first: Process | None, config: PretrainConfig, model: str, in_turn: bool) -> Figures:
    """Return a side's figures; `ratio_first_over_this` is the first side's speed over its, median of rounds.

    Where the first side failed there is neither a ratio nor a share.
    """
    rate, ratio = MatrixRate(math.nan, 0, config.model.dtype), None
    if first is not None:
        pairs = zip(first.rounds, side.rounds, strict=True)
        ratio = statistics.median(statistics.median(theirs) / statistics.median(ours) for ours, theirs in pairs)
        rate = MatrixRate(*first.about["matrix"])
    seconds = [second for round_ in side.rounds for second in round_]
    about = {"version": side.about["version"], "device": side.about["device"], "matrix_size": rate.size}
    attention = {"jax": config.model.attention, "jax-cudnn": "cudnn"}.get(side.name)
    about |= {"side": side.name, "model": model, "remat": config.model.remat, "attention": attention}
    about |= {"in_turn": in_turn, "ratio_first_over_this": ratio}
    return about | figures(config, seconds, side.about["peak_bytes"], side.about["compile_seconds"], rate)


def largest_batch(config: PretrainConfig, arguments: argparse.Namespace) -> Figures:
    """Find the largest batch that this project's side can take, to a sixteenth: doubled, then halved in between.

    Returns the row of the largest that fitted, with the smallest that did not; the row of a failure where not even 8
    images fit, or that is of something else than memory.
    """
    batch, good, bad, best = config.batch_size, 0, None, {}
    while bad is None or bad - good > max(8, good // 16):
        (row,) = compare(["jax"], dataclasses.replace(config, batch_size=batch), arguments)
        print(f"batch {batch}: {row.get('failed', 'fits')}", file=sys.stderr, flush=True)
        if "failed" not in row:
            good, best = batch, row
        elif not lacks_memory(row["failed"]) or (good == 0 and batch <= 8):
            return row
        else:
            bad = batch
        batch = batch * 2 if bad is None else max(8, good + 1, (good + bad) // 2 // 8 * 8)
    return best | {"largest_batch_below": bad}


def main() -> int:
    """Check all that is given, then print a table for each batch; 1 where a row failed."""
    arguments = parse()
    names = ["jax", *(name for name in arguments.against.split(",") if name)]
    for number, name in enumerate(names):
        if name not in SIDES:
            raise SystemExit(f"--against {name}: unknown (there are: {', '.join(SIDES[1:])})")
        if name in names[:number]:
            raise SystemExit(f"--against {arguments.against} would time {name} twice: name it once, jax not at all")
    for name in ("rounds", "steps", "warmup"):
        if getattr(arguments, name) < 1:
            raise SystemExit(f"--{name} {getattr(arguments, name)} must be positive")
    variants = {"none": [False], "encoder": [True], "both": [True, False]}[arguments.mask_tokens]
    if arguments.largest_batch and (len(variants), len(arguments.batch)) != (1, 1):
        raise SystemExit("--largest-batch needs one --batch to begin with, and --mask-tokens none or encoder")
    configs_by_batch = [
        [
            bench_config(arguments.model, batch, arguments.dtype, tokens, arguments.remat, arguments.attention)
            for tokens in variants
        ]
        for batch in arguments.batch
    ]
    if "jax-cudnn" in names:
        bench_config(arguments.model, 1, arguments.dtype, attention="cudnn")
    if arguments.attention == "cudnn" and "jax-cudnn" in names:
        raise SystemExit("--attention cudnn --against jax-cudnn would time the same twice: leave one out")
    if arguments.largest_batch:
        return report([largest_batch(configs_by_batch[0][0], arguments)], arguments)
    failed = False
    for configs in configs_by_batch:
        tables = [compare(names, config, arguments) for config in configs]
        for rows in tables:
            failed = report(rows, arguments) or failed
        if len(tables) == 2 and not arguments.json:
            for with_tokens, without in zip(*tables, strict=True):
                if "failed" not in with_tokens and "failed" not in without:
                    print(factor_line(arguments.model, with_tokens, without), flush=True)
    return failed


def report(rows: list[Figures], arguments: argparse.Namespace) -> bool:
    """Print a table, or a line of JSON, and return whether a row failed."""
    if arguments.json:
        print(json.dumps(rows), flush=True)
    else:
        good = next((row for row in rows if "failed" not in row), None)
        if good is not None:
            tokens = ", mask tokens in the encoder" if good["mask_tokens"] else ""
            counted = f"{arguments.rounds} rounds of {arguments.steps} steps"
            print(f"{caption(good)}{tokens}; {counted}")
            if warning := warning_of_order(rows):
                print(warning)
        print(HEAD, *map(line, rows), sep="\n", flush=True)
        for row in rows:
            if "largest_batch_below" in row:
                print(f"batch {row['largest_batch_below']} fails", flush=True)
    return any("failed" in row for row in rows)


if __name__ == "__main__":
    sys.exit(ended(main))
