"""Time this project's training step beside the PyTorch reference's, in turn, each in a process of its own.

    python scripts/bench_step.py --model vit_small_patch16 --batch 16
    python scripts/bench_step.py --model vit_large_patch16 --batch 256 --dtype bfloat16 --against torch,torch-compile

A round is a few steps of one side, then of the other; the order turns round each time, so that a machine whose speed
drifts treats both alike. Reported are medians over all timed steps, and the median of the rounds' ratios. FLOP/s count
the model's definition (mae_jax/models/flops.py), forward + backward as three times forward.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import tyro

from mae_jax.config import MODELS, AugmentConfig, ModelConfig, OptimConfig, PretrainConfig
from mae_jax.models.flops import training_flops
from mae_jax.presets import PRESETS

SIDES = ("jax", "torch", "torch-compile")
PAUSE = 0.3  # seconds between sides: thread pools spin for a while after their work


@dataclass(frozen=True)
class Arguments:
    """The training step against PyTorch's: images/s, milliseconds, FLOP/s, peak memory, compile time."""

    model: Literal[(*MODELS, *PRESETS)] = "vit_small_patch16"  # type: ignore[valid-type]
    batch: int = 16
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    device: Literal["cpu", "gpu"] | None = None
    """Where both sides run; by default on what each finds."""
    against: str = "torch"
    """Sides to compare with, comma-separated: torch, torch-compile; nothing for this project alone."""
    rounds: int = 10
    steps: int = 3
    """Timed steps in a round."""
    warmup: int = 2
    mask_tokens: bool = False
    """The encoder sees mask tokens, as in the paper's ablation (Table 1c)."""
    json: bool = False
    """Print the result as one line of JSON, in place of the table."""


def run_config(arguments: Arguments) -> PretrainConfig:
    """What both sides train: normalised pixels, the paper's optimizer."""
    name = arguments.model
    model = MODELS[name] if name in MODELS else PRESETS[name]().model
    model = replace(model, dtype=arguments.dtype, norm_pix_loss=True, encoder_mask_tokens=arguments.mask_tokens)
    statistics = ((0.5,) * model.in_channels,) * 2
    augment = AugmentConfig(mean=statistics[0], std=statistics[1])
    return PretrainConfig(model=model, augment=augment, optim=OptimConfig(), batch_size=arguments.batch, devices=1)


@dataclass(frozen=True)
class Side:
    """A step ready to be timed."""

    step: Callable[[], None]  # one step, waited for
    peak_bytes: Callable[[], int]
    version: str
    device: str


def peak_host_bytes() -> int:
    """The most memory that this process has held (Linux counts kilobytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def jax_side(config: PretrainConfig, device_kind: str | None) -> Side:
    """This project's step, as `mae-jax pretrain` runs it."""
    from mae_jax.train import cpu

    if device_kind is not None:
        os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda"}[device_kind]
    cpu.settle()
    import jax
    import numpy as np

    jax.config.update("jax_enable_x64", config.model.dtype == "float64")

    from mae_jax.train.engines import choose_devices, pmap_engine
    from mae_jax.train.objective import Batch
    from mae_jax.train.steps import init_state, make_step

    engine = pmap_engine(
        lambda axis: make_step(config, steps_per_epoch=1000.0, epochs=100.0, axis_name=axis),
        choose_devices(1),
        config.batch_size,
        config.accumulate,
    )
    model = config.model
    shape = (config.batch_size, *model.image_hw, model.in_channels)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    batch = engine.put(Batch(images, np.arange(config.batch_size, dtype=np.uint32)))
    state = engine.place(init_state(config))

    def step() -> None:
        nonlocal state
        state, metrics = engine.step(state, batch)
        jax.block_until_ready((state, metrics))

    device = engine.devices[0]

    def peak_bytes() -> int:
        return peak_host_bytes() if device.platform == "cpu" else device.memory_stats()["peak_bytes_in_use"]

    return Side(step, peak_bytes, f"jax {jax.__version__}", device.device_kind)


def torch_side(config: PretrainConfig, device_kind: str | None, compiled: bool) -> Side:
    """The reference's step, as a PyTorch user would run it: autocast, fused AdamW, optionally torch.compile."""
    import numpy as np
    import torch

    from parity.torch_mae import MaskedAutoencoder
    from parity.torch_train import adamw

    device_kind = device_kind or ("gpu" if torch.cuda.is_available() else "cpu")
    device = torch.device({"cpu": "cpu", "gpu": "cuda"}[device_kind])
    model_config = config.model
    dtype = torch.float64 if model_config.dtype == "float64" else torch.float32
    model = MaskedAutoencoder(model_config).to(device, dtype)
    optimizer = adamw(model, config.optim, fused=True)
    forward = torch.compile(model) if compiled else model
    shape = (config.batch_size, model_config.in_channels, *model_config.image_hw)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).to(device)
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
    return Side(step, peak_bytes, f"torch {torch.__version__}", name)


def serve(name: str, arguments: Arguments) -> None:
    """Be one side: warm up, then time as many steps as each line of standard input says."""
    began = time.perf_counter()
    config = run_config(arguments)
    if name == "jax":
        side = jax_side(config, arguments.device)
    else:
        side = torch_side(config, arguments.device, compiled=name == "torch-compile")
    side.step()
    first = time.perf_counter() - began
    for _ in range(arguments.warmup - 1):
        side.step()
    print(json.dumps({"first_step": first, "version": side.version, "device": side.device}), flush=True)
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
        command = [sys.executable, __file__, f"--serve={name}", *words]
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


def result(side: Process, first: Process, arguments: Arguments, model: ModelConfig) -> dict[str, Any]:
    """A side's figures; `ratio` is its speed over the first side's, the median over rounds."""
    seconds = statistics.median(s for round_ in side.rounds for s in round_)
    pairs = zip(first.rounds, side.rounds, strict=True)
    return {
        "side": side.name,
        "model": arguments.model,
        "batch": arguments.batch,
        "dtype": arguments.dtype,
        "images_per_second": arguments.batch / seconds,
        "milliseconds": seconds * 1e3,
        "gflops_per_second": training_flops(model) * arguments.batch / seconds / 1e9,
        "peak_mib": side.peak_bytes / 2**20,
        "first_step_seconds": side.about["first_step"],
        "ratio_first_over_this": statistics.median(statistics.median(b) / statistics.median(a) for a, b in pairs),
        "version": side.about["version"],
        "device": side.about["device"],
    }


def main() -> None:
    words = sys.argv[1:]
    if words[:1] and words[0].startswith("--serve="):
        serve(words[0].removeprefix("--serve="), tyro.cli(Arguments, args=words[1:]))
        return
    arguments = tyro.cli(Arguments)
    names = ["jax", *(name for name in arguments.against.split(",") if name)]
    for name in names:
        if name not in SIDES:
            raise SystemExit(f"--against {name}: unknown (there are: {', '.join(SIDES[1:])})")
    sides = [Process(name, words) for name in names]
    if len({side.about["device"] for side in sides}) > 1:
        found = ", ".join(f"{side.name} on {side.about['device']}" for side in sides)
        raise SystemExit(f"the sides are not on one device ({found}): give --device cpu or gpu")
    for number in range(arguments.rounds):
        for side in sides if number % 2 == 0 else sides[::-1]:
            side.round(arguments.steps)
    model = run_config(arguments).model
    for side in sides:
        side.close()
    results = [result(side, sides[0], arguments, model) for side in sides]
    if arguments.json:
        print(json.dumps(results))
        return
    print(f"{arguments.model}, batch {arguments.batch}, {arguments.dtype}, {results[0]['device']}, ", end="")
    print(f"{arguments.rounds} rounds of {arguments.steps} steps")
    print(
        f"{'side':14}{'images/s':>10}{'ms':>10}{'GFLOP/s':>10}{'peak MiB':>10}{'first s':>9}{'jax : it':>10}  version"
    )
    for row in results:
        print(
            "{side:14}{images_per_second:10.2f}{milliseconds:10.1f}{gflops_per_second:10.1f}{peak_mib:10.0f}"
            "{first_step_seconds:9.1f}{ratio_first_over_this:10.3f}  {version}".format(**row)
        )


if __name__ == "__main__":
    main()
