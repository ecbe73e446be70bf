"""Time one side of the benchmark, in a process of its own: scripts/bench_step.py starts it and asks it for steps.

    python scripts/bench_side.py torch --model digits --batch 16      # then a number of steps on each line of input

It answers each line with the seconds of those steps, as JSON; the first line that it prints, once it is warm, is about
itself and its memory. It ends with its input, whatever it is at: so it outlives nobody who has started it.
"""

import argparse
import json
import os
import queue
import sys
import threading
import time

from ended import ended

from mae_jax.bench.recipe import ReadyStep, bench_config, peak_host_bytes, pixels, use
from mae_jax.config import PretrainConfig

SIDES = ("jax", "jax-cudnn", "torch", "torch-compile")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what a side trains, and where."""
    parser.add_argument("--model", default="vit_small_patch16", help="a model, or the name of a preset")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="where all sides run; by default on what each finds")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those that are timed")
    parser.add_argument("--remat", action="store_true", help="this project's side recomputes blocks going backward")
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla", help="what this project's side uses")


def config_of(arguments: argparse.Namespace) -> PretrainConfig:
    """Return what all sides train."""
    return bench_config(
        arguments.model,
        arguments.batch,
        arguments.dtype,
        arguments.encoder_mask_tokens,
        arguments.remat,
        "cudnn" if arguments.side == "jax-cudnn" else arguments.attention,
    )


def jax_side(arguments: argparse.Namespace) -> ReadyStep:
    """Compile this project's step, as `mae-jax pretrain` runs it."""
    from mae_jax.cli import process

    use(arguments.device)
    config = config_of(arguments)
    process.set_up(config.model, config.batch_size)
    import jax

    jax.config.update("jax_enable_x64", arguments.dtype == "float64")

    from mae_jax.bench.step import check_device, ready_step

    check_device(arguments.device)
    return ready_step(config)


def torch_side(arguments: argparse.Namespace, compiled: bool) -> ReadyStep:
    """Build the reference's step as a PyTorch user would run it: autocast, fused AdamW, optionally torch.compile."""
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
    if device_kind == "gpu":
        torch.set_float32_matmul_precision("high")  # factors in TF32, as JAX multiplies float32 by default
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


def read_input(lines: "queue.Queue[str]") -> None:
    """Hand on each line of standard input, and end this process when there are no more and all are answered.

    A thread reads, so that a side which compiles for minutes ends too when nobody is left to ask it.
    """
    with open(0, closefd=False) as given:  # a file of its own: Python closes sys.stdin at exit, and would wait for it
        for text in given:
            lines.put(text)
    lines.join()
    os._exit(0)


def main() -> None:
    """Warm up, then time as many steps as each line of standard input asks for."""
    parser = argparse.ArgumentParser(description="One side of the benchmark.")
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--encoder-mask-tokens", action="store_true")
    add_flags(parser)
    arguments = parser.parse_args()
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=read_input, args=(lines,), daemon=True).start()
    name = arguments.side
    ours = name.startswith("jax")
    side = jax_side(arguments) if ours else torch_side(arguments, compiled=name == "torch-compile")
    seconds = []
    for _ in range(1 + arguments.warmup):
        began = time.perf_counter()
        side.step()
        seconds.append(time.perf_counter() - began)
    # torch.compile works at the first step.
    compiling = max(0.0, seconds[0] - seconds[-1]) if name == "torch-compile" else side.compile_seconds
    about = {"version": side.version, "device": side.device, "compile_seconds": compiling}
    about["peak_bytes"] = side.peak_bytes()  # before the large product, which is no part of a step
    about["matrix"] = None
    if ours:
        from mae_jax.bench.step import matrix_rate

        about["matrix"] = matrix_rate(arguments.dtype)
    print(json.dumps(about), flush=True)
    while True:
        seconds = []
        for _ in range(int(lines.get())):
            began = time.perf_counter()
            side.step()
            seconds.append(time.perf_counter() - began)
        print(json.dumps(seconds), flush=True)
        lines.task_done()


if __name__ == "__main__":
    sys.exit(ended(main))
