"""Train the same 20 steps on simulated devices under every engine, and compare each with one device.

    python scripts/compare_engines.py                       # the table of the README: 36 runs in each precision
    python scripts/compare_engines.py --quick               # one of them, in float64

Compared are the losses of all steps, and the raw gradient of every tensor, which AdamW would hide (it divides any
factor out): after the first update its first moment is (1 - beta1) times the gradient that it was given. Differences
are relative: of losses |a - b| / |b|, of a tensor max |a - b| / max |b|. Exits with 1 if one passes its bound.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import tyro

STEPS = 20
BOUNDS = {"float32": 1e-5, "float64": 1e-12}
COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Arguments:
    """Every engine against one device: losses and raw gradients."""

    precision: Literal["float32", "float64", "both"] = "both"
    quick: bool = False


class Case(NamedTuple):
    """How to run: `ways` is --fsdp."""

    engine: str
    devices: int
    ways: int | None
    accumulate: int

    def __str__(self) -> str:
        return f"{self.engine}{f' {self.ways} ways' if self.ways else ''}, accumulate {self.accumulate}"


ONE = Case("pmap", 1, None, 1)
QUICK = [Case("fsdp", 4, 2, 2)]


def all_cases() -> Iterator[Case]:
    """Yield all engines on all numbers of devices, with and without accumulation."""
    for accumulate in (1, 2):
        for engine in ("pmap", "jit"):
            yield from (Case(engine, devices, None, accumulate) for devices in COUNTS)
        yield from (Case("fsdp", devices, ways, accumulate) for ways in COUNTS for devices in COUNTS if ways <= devices)


def train(case: Case, precision: str) -> tuple[Any, Any]:
    """Train, and return the losses (steps,) and the raw gradients of the first step."""
    import numpy as np

    from mae_jax.config import AugmentConfig, ModelConfig, OptimConfig, PretrainConfig, TransformerConfig
    from mae_jax.train.build import Length, build_engine
    from mae_jax.train.objective import Batch
    from mae_jax.train.step import init_state

    config = PretrainConfig(
        model=ModelConfig(
            image_size=8,
            patch_size=2,
            in_channels=1,
            encoder=TransformerConfig(width=32, depth=2, heads=4),
            decoder=TransformerConfig(width=16, depth=1, heads=2),
            norm_pix_loss=True,
            dtype=precision,
        ),
        augment=AugmentConfig(mean=(0.3,), std=(0.4,)),
        # eps keeps AdamW from magnifying the rounding of the key bias's gradient, which is zero.
        optim=OptimConfig(base_lr=0.02, warmup_epochs=1, eps=1e-4),
        batch_size=32,
        accumulate=case.accumulate,
        engine=case.engine,
        devices=case.devices,
        fsdp=case.ways,
    )
    engine = build_engine(config, Length(STEPS, 4.0, 10.0))
    rng, state, losses, gradients = np.random.default_rng(0), engine.init_state(lambda: init_state(config)), [], None
    for step in range(STEPS):
        images = rng.integers(0, 256, (32, 8, 8, 1), np.uint8)
        positions = np.arange(32 * step, 32 * (step + 1), dtype=np.uint32)
        state, metrics = engine.step(state, engine.put_batch(Batch(images, positions)))
        losses.append(float(metrics.loss))
        if step == 0:
            gradients = first_gradients(state.optimizer, config.optim.beta1)
    if not losses[-1] < 0.9 * losses[0]:
        raise RuntimeError(f"nothing was learnt: {losses[0]} to {losses[-1]}")
    return np.array(losses), gradients


def first_gradients(optimizer: Any, beta1: float) -> Any:
    """Return what AdamW was given in its first update, out of its state after it."""
    import jax
    import numpy as np
    import optax

    return jax.tree.map(lambda moment: np.asarray(moment) / (1 - beta1), optax.tree.get(optimizer, "mu"))


def compare(precision: str, cases: list[Case], quick: bool) -> int:
    """Print a row for each case, and return 1 if one is too far from one device."""
    import jax
    import numpy as np

    jax.config.update("jax_enable_x64", precision == "float64")
    jax.config.update("jax_disable_most_optimizations", quick)  # of the programs, whose sums stay what they are
    losses, gradients = train(ONE, precision)
    worst = 0.0
    print(f"| {precision} | devices | losses of {STEPS} steps | raw gradients |\n|---|---|---|---|")
    for case in cases:
        found, found_gradients = train(case, precision)
        of_losses = float(np.max(np.abs(found - losses) / np.abs(losses)))
        apart = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), found_gradients, gradients)
        of_gradients = float(max(jax.tree.leaves(apart)))
        worst = max(worst, of_losses, of_gradients)
        print(f"| {case} | {case.devices} | {of_losses:.1e} | {of_gradients:.1e} |", flush=True)
    within = worst <= BOUNDS[precision]
    print(f"worst {worst:.1e}, {'within' if within else 'NOT WITHIN'} {BOUNDS[precision]:.0e}\n")
    return int(not within)


def main() -> int:
    """Run each precision in a process of its own: JAX's default dtype is set once."""
    arguments = tyro.cli(Arguments)
    cases = QUICK if arguments.quick else list(all_cases())
    if arguments.precision != "both":
        return compare(arguments.precision, cases, arguments.quick)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={max(COUNTS)}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    names = ["float64"] if arguments.quick else list(BOUNDS)
    commands = [[sys.executable, __file__, f"--precision={name}", *sys.argv[1:]] for name in names]
    return max(subprocess.run(command, env=environment).returncode for command in commands)


if __name__ == "__main__":
    sys.exit(main())
