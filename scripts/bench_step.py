"""Time this project's training step beside the PyTorch reference's, in turn, each in a process of its own.

    python scripts/bench_step.py --model vit_small_patch16 --batch 16
    python scripts/bench_step.py --model vit_large_patch16 --batch 256 --dtype bfloat16 --against torch,torch-compile
    python scripts/bench_step.py --model vit_large_patch16 --batch 64 128 256 --mask-tokens both --against ''
    python scripts/bench_step.py --model vit_huge_patch14 --dtype bfloat16 --remat --largest-batch

A round is a few steps of one side, then of the other; the order turns round each time, so that a machine whose speed
drifts treats both alike. Reported are medians over all timed steps, and the median of the rounds' ratios. FLOP/s count
the model's definition (mae_jax/models/flops.py), forward + backward as three times forward; their share is of a large
matrix product that this project's side times before its first step. A side that fails, such as for want of memory,
leaves a row that says why.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from mae_jax.bench.setting import ReadyStep, bench_config, peak_host_bytes, pixels
from mae_jax.bench.table import HEAD, Figures, MatrixRate, caption, factor_line, figures, line
from mae_jax.config import PretrainConfig
from mae_jax.errors import StatedError

SIDES = ("jax", "torch", "torch-compile")
PAUSE = 0.3  # seconds between sides: thread pools spin for a while after their work


def parse(words: list[str]) -> argparse.Namespace:
    """The command line; only the standard library reads it, since machines for benchmarks are bare."""
    parser = argparse.ArgumentParser(description="The training step beside PyTorch's.")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", default="vit_small_patch16", help="a model, or the name of a preset")
    parser.add_argument("--batch", type=int, nargs="+", default=[16], help="several: one table after the other")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="where all sides run; by default on what each finds")
    parser.add_argument("--against", default="torch", help="comma-separated: torch, torch-compile; or nothing")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3, help="timed steps in a round")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument(
        "--mask-tokens", choices=("none", "encoder", "both"), default="none", help="in the encoder (Table 1c)"
    )
    parser.add_argument(
        "--remat", action="store_true", help="this project's side recomputes blocks in the backward pass"
    )
    parser.add_argument("--largest-batch", action="store_true", help="how large a batch this project's side can take")
    parser.add_argument("--json", action="store_true", help="print each table as one line of JSON")
    return parser.parse_args(words)


def config_of(arguments: argparse.Namespace) -> PretrainConfig:
    """What all sides train."""
    tokens = arguments.mask_tokens == "encoder"
    return bench_config(arguments.model, arguments.batch[0], arguments.dtype, tokens, arguments.remat)


def jax_side(arguments: argparse.Namespace) -> tuple[ReadyStep, tuple[float, int, str]]:
    """This project's step, as `mae-jax pretrain` runs it, and the device's matrix rate."""
    from mae_jax.train import cpu

    if arguments.device is not None:
        os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda"}[arguments.device]
    config = config_of(arguments)
    cpu.settle(config.model, config.batch_size)
    import jax

    jax.config.update("jax_enable_x64", arguments.dtype == "float64")

    from mae_jax.bench.matrix import matrix_rate
    from mae_jax.bench.step import ready_step

    rate = matrix_rate(arguments.dtype)
    return ready_step(config), tuple(rate)


def torch_side(arguments: argparse.Namespace, compiled: bool) -> ReadyStep:
    """The reference's step, as a PyTorch user would run it: autocast, fused AdamW, optionally torch.compile."""
    import torch

    from parity.torch_mae import MaskedAutoencoder
    from parity.torch_train import adamw

    config = config_of(arguments)
    device_kind = arguments.device or ("gpu" if torch.cuda.is_available() else "cpu")
    device = torch.device({"cpu": "cpu", "gpu": "cuda"}[device_kind])
    model_config = config.model
    dtype = torch.float64 if model_config.dtype == "float64" else torch.float32
    model = MaskedAutoencoder(model_config).to(device, dtype)
    optimizer = adamw(model, config.optim, fused=True)
    forward = torch.compile(model) if compiled else model
    images = torch.from_numpy(pixels(config)).permute(0, 3, 1, 2).contiguous().to(device)
    mean, std = (
        torch.tensor(v, device=device, dtype=dtype).view(-1, 1, 1) for v in (config.augment.mean, config.augment.std)
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=model_config.dtype == "bfloat16")

    def step() -> None:
        noise = torch.rand(config.batch_size, model_config.num_patches, device=device)
        with autocast:
            loss = forward((images / 255 - mean) / std, noise).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    def peak_bytes() -> int:
        return peak_host_bytes() if device.type == "cpu" else torch.cuda.max_memory_allocated()

    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return ReadyStep(step, peak_bytes, 0.0, f"torch {torch.__version__}", name)


def serve(arguments: argparse.Namespace) -> None:
    """Be one side: warm up, then time as many steps as each line of standard input says."""
    name = arguments.serve
    matrix = None
    if name == "jax":
        side, matrix = jax_side(arguments)
    else:
        side = torch_side(arguments, compiled=name == "torch-compile")
    seconds = []
    for _ in range(1 + arguments.warmup):
        began = time.perf_counter()
        side.step()
        seconds.append(time.perf_counter() - began)
    # torch.compile works at the first step.
    compiling = max(0.0, seconds[0] - seconds[-1]) if name == "torch-compile" else side.compile_seconds
    about = {"version": side.version, "device": side.device, "compile_seconds": compiling, "matrix": matrix}
    print(json.dumps(about), flush=True)
    for count in sys.stdin:
        seconds = []
        for _ in range(int(count)):
            began = time.perf_counter()
            side.step()
            seconds.append(time.perf_counter() - began)
        print(json.dumps({"seconds": seconds, "peak_bytes": side.peak_bytes()}), flush=True)


class SideFailed(Exception):
    """A side ended before it should; says what it said last."""


class Process:
    """One side in a process of its own.

    Raises:
      SideFailed: it ended, here or in a round.
    """

    def __init__(self, name: str, words: list[str], alone: bool) -> None:
        self.name = name
        command = [sys.executable, __file__, *words, f"--serve={name}"]
        # JAX would take three quarters of a GPU's memory at once, and leave the others none.
        memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} if alone else {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=os.environ | memory,
        )
        self.about = self._read()
        self.rounds: list[list[float]] = []
        self.peak_bytes = 0

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._said.seek(0)
            raise SideFailed(reason(self._said.read(), code))
        return json.loads(line)

    def round(self, steps: int) -> None:
        """Time some steps."""
        time.sleep(PAUSE)
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        answer = self._read()
        self.rounds.append(answer["seconds"])
        self.peak_bytes = answer["peak_bytes"]

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait()
        self._said.close()


def reason(said: str, code: int) -> str:
    """Of all that a side said, the line that tells why it ended."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if "out of memory" in line.lower() or "RESOURCE_EXHAUSTED" in line]
    return (telling or lines or [f"exit code {code}"])[-1][:200]


def words_of(arguments: argparse.Namespace, batch: int, tokens: bool) -> list[str]:
    """The command line of a side."""
    return [
        f"--model={arguments.model}",
        f"--batch={batch}",
        f"--dtype={arguments.dtype}",
        f"--warmup={arguments.warmup}",
        f"--mask-tokens={'encoder' if tokens else 'none'}",
        *([f"--device={arguments.device}"] if arguments.device else []),
        *(["--remat"] if arguments.remat else []),
    ]


def compare(arguments: argparse.Namespace, names: list[str], batch: int, tokens: bool) -> list[Figures]:
    """A row for each side.

    Memory of a device is shared by the sides that are there at once: where one finds too little, each is timed alone.
    """
    words = words_of(arguments, batch, tokens)
    rows, failed = timed(arguments, names, words, batch, tokens)
    if failed and len(names) > 1:
        rows = [row for name in names for row in timed(arguments, [name], words, batch, tokens)[0]]
    return rows


def timed(
    arguments: argparse.Namespace, names: list[str], words: list[str], batch: int, tokens: bool
) -> tuple[list[Figures], bool]:
    """Sides in turn; the rows, and whether one failed, which ends the others too."""
    sides: list[Process] = []
    name = names[0]
    try:
        for name in names:
            sides.append(Process(name, words, alone=len(names) == 1))
        if len({side.about["device"] for side in sides}) > 1:
            found = ", ".join(f"{side.name} on {side.about['device']}" for side in sides)
            raise SystemExit(f"the sides are not on one device ({found}): give --device cpu or gpu")
        for number in range(arguments.rounds):
            for side in sides if number % 2 == 0 else sides[::-1]:
                name = side.name
                side.round(arguments.steps)
    except SideFailed as error:
        return [
            {"side": name, "model": arguments.model, "batch": batch, "mask_tokens": tokens, "failed": str(error)}
        ], True
    finally:
        for side in sides:
            side.close()
    config = bench_config(arguments.model, batch, arguments.dtype, tokens, arguments.remat)
    return [row_of(side, sides[0], config, arguments.model) for side in sides], False


def row_of(side: Process, first: Process, config: PretrainConfig, model: str) -> Figures:
    """A side's figures; `ratio_first_over_this` is the first side's speed over its, median of rounds."""
    pairs = zip(first.rounds, side.rounds, strict=True)
    ratio = statistics.median(statistics.median(theirs) / statistics.median(ours) for ours, theirs in pairs)
    rate = MatrixRate(*(side.about["matrix"] or first.about["matrix"] or (math.nan, 0, config.model.dtype)))
    seconds = [second for round_ in side.rounds for second in round_]
    about = {"version": side.about["version"], "device": side.about["device"], "matrix_size": rate.size}
    told = {"side": side.name, "model": model, "remat": config.model.remat, "ratio_first_over_this": ratio}
    return told | about | figures(config, seconds, side.peak_bytes, side.about["compile_seconds"], rate)


def largest_batch(arguments: argparse.Namespace) -> Figures:
    """The largest multiple of 8 images whose step this project's side can take: doubled, then halved in between."""

    def row(batch: int) -> Figures:
        return timed(arguments, ["jax"], words_of(arguments, batch, arguments.mask_tokens == "encoder"), batch, False)[
            0
        ][0]

    good, bad, best = 0, None, None
    batch = arguments.batch[0]
    while bad is None or bad - good > max(8, good // 16):
        found = row(batch)
        print(f"batch {batch}: {found.get('failed', 'fits')}", file=sys.stderr, flush=True)
        if "failed" in found:
            bad = batch
            if good == 0 and batch <= 8:
                return found
        else:
            good, best = batch, found
        batch = batch * 2 if bad is None else max(8, (good + bad) // 2 // 8 * 8)
    return best | {"largest_batch_below": bad}


def main() -> None:
    words = sys.argv[1:]
    arguments = parse(words)
    if arguments.serve:
        serve(arguments)
        return
    names = ["jax", *(name for name in arguments.against.split(",") if name)]
    for name in names:
        if name not in SIDES:
            raise SystemExit(f"--against {name}: unknown (there are: {', '.join(SIDES[1:])})")
    for name in ("rounds", "steps", "warmup"):
        if getattr(arguments, name) < 1:
            raise SystemExit(f"--{name} {getattr(arguments, name)} must be positive")
    variants = {"none": [False], "encoder": [True], "both": [True, False]}[arguments.mask_tokens]
    try:
        for batch in arguments.batch:
            for tokens in variants:
                bench_config(arguments.model, batch, arguments.dtype, tokens, arguments.remat)
    except StatedError as error:
        raise SystemExit(str(error)) from error
    if arguments.largest_batch:
        if arguments.mask_tokens == "both":
            raise SystemExit("--mask-tokens both has no one largest batch: give none or encoder")
        sys.exit(report([largest_batch(arguments)], arguments))
    failed = False
    for batch in arguments.batch:
        tables = [compare(arguments, names, batch, tokens) for tokens in variants]
        for rows in tables:
            failed = report(rows, arguments) or failed
        if len(tables) == 2 and not arguments.json:
            for with_tokens, without in zip(*tables, strict=False):
                if "failed" not in with_tokens and "failed" not in without:
                    print(factor_line(arguments.model, with_tokens, without))
    sys.exit(failed)


def report(rows: list[Figures], arguments: argparse.Namespace) -> bool:
    """Print a table, or a line of JSON; whether a row failed."""
    if arguments.json:
        print(json.dumps(rows), flush=True)
    else:
        good = next((row for row in rows if "failed" not in row), None)
        if good is not None:
            rate = MatrixRate(good["matrix_tflops_per_second"] * 1e12, good["matrix_size"], good["dtype"])
            tokens = ", mask tokens in the encoder" if good["mask_tokens"] else ""
            counted = f"{arguments.rounds} rounds of {arguments.steps} steps"
            print(f"{caption(arguments.model, rate, good['device'])}{tokens}; {counted}")
        print(HEAD, *map(line, rows), sep="\n", flush=True)
    return any("failed" in row for row in rows)


if __name__ == "__main__":
    main()
