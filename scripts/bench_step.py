"""Time this project's training step beside the PyTorch reference's, in turn, each in a process of its own.

    python scripts/bench_step.py --model vit_small_patch16 --batch 16
    python scripts/bench_step.py --model vit_large_patch16 --batch 256 --dtype bfloat16 --against torch,torch-compile

A round is a few steps of one side, then of the other; the order turns round each time, so that a machine whose speed
drifts treats both alike. Reported are medians over all timed steps, and the median of the rounds' ratios. FLOP/s count
the model's definition (mae_jax/models/flops.py), forward + backward as three times forward; their share is of a large
matrix product that this project's side times before its first step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from mae_jax.bench.setting import ReadyStep, bench_config, peak_host_bytes, pixels
from mae_jax.config import PretrainConfig
from mae_jax.errors import StatedError

SIDES = ("jax", "torch", "torch-compile")
PAUSE = 0.3  # seconds between sides: thread pools spin for a while after their work


def parse(words: list[str]) -> argparse.Namespace:
    """The command line; only the standard library reads it, since machines for benchmarks are bare."""
    parser = argparse.ArgumentParser(description="The training step beside PyTorch's.")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", default="vit_small_patch16", help="a model, or the name of a preset")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="where all sides run; by default on what each finds")
    parser.add_argument("--against", default="torch", help="comma-separated: torch, torch-compile; or nothing")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3, help="timed steps in a round")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--mask-tokens", action="store_true", help="the encoder sees mask tokens (Table 1c)")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON, without the table")
    return parser.parse_args(words)


def config_of(arguments: argparse.Namespace) -> PretrainConfig:
    """What all sides train."""
    return bench_config(arguments.model, arguments.batch, arguments.dtype, arguments.mask_tokens)


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
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            began = time.perf_counter()
            side.step()
            seconds.append(time.perf_counter() - began)
        print(json.dumps({"seconds": seconds, "peak_bytes": side.peak_bytes()}), flush=True)


class Process:
    """One side in a process of its own."""

    def __init__(self, name: str, words: list[str]) -> None:
        self.name = name
        command = [sys.executable, __file__, *words, f"--serve={name}"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._read()
        self.rounds: list[list[float]] = []
        self.peak_bytes = 0

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"side {self.name} ended with exit code {self._process.wait()}")
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
    for name in ("batch", "rounds", "steps", "warmup"):
        if getattr(arguments, name) < 1:
            raise SystemExit(f"--{name} {getattr(arguments, name)} must be positive")
    try:
        config_of(arguments)
    except StatedError as error:
        raise SystemExit(str(error)) from error
    sides = [Process(name, words) for name in names]
    if len({side.about["device"] for side in sides}) > 1:
        found = ", ".join(f"{side.name} on {side.about['device']}" for side in sides)
        raise SystemExit(f"the sides are not on one device ({found}): give --device cpu or gpu")
    for number in range(arguments.rounds):
        for side in sides if number % 2 == 0 else sides[::-1]:
            side.round(arguments.steps)
    for side in sides:
        side.close()
    report(sides, arguments)


def report(sides: list[Process], arguments: argparse.Namespace) -> None:
    """Print all sides' figures; `ratio_first_over_this` is the first side's speed over a side's, median of rounds."""
    from mae_jax.bench.matrix import MatrixRate
    from mae_jax.bench.table import HEAD, caption, figures, line

    config = config_of(arguments)
    rate, rows = MatrixRate(*sides[0].about["matrix"]), []
    for side in sides:
        seconds = [second for round_ in side.rounds for second in round_]
        pairs = zip(sides[0].rounds, side.rounds, strict=True)
        ratio = statistics.median(statistics.median(theirs) / statistics.median(ours) for ours, theirs in pairs)
        rows.append(
            {"side": side.name, "model": arguments.model, "ratio_first_over_this": ratio}
            | {"version": side.about["version"], "device": side.about["device"]}
            | figures(config, seconds, side.peak_bytes, side.about["compile_seconds"], rate)
        )
    if arguments.json:
        print(json.dumps(rows))
        return
    print(f"{caption(arguments.model, rate, rows[0]['device'])}; {arguments.rounds} rounds of {arguments.steps} steps")
    print(HEAD, *(line(row) for row in rows), sep="\n")


if __name__ == "__main__":
    main()
