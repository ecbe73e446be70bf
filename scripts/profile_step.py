"""Print where a training step's time goes, by operation.

    python scripts/profile_step.py --model vit_large_patch16 --batch 256 --dtype bfloat16 > profile.txt

Operations are the compiled program's; those that the same line of the model made in different blocks are one row.
Durations are of the device (on a CPU: of all its threads together, so they can add up to more than the step took).
"""

import argparse
import collections
import re
import sys
import tempfile
import time
from pathlib import Path

from ended import ended

from mae_jax.bench.program import place
from mae_jax.bench.recipe import bench_config, use

INSTRUCTION = re.compile(r'\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"')


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="A step's time by operation.")
    parser.add_argument("--model", default="vit_small_patch16", help="a model, or the name of a preset")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="by default what JAX finds")
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=60)
    return parser.parse_args()


def origins(program: str) -> dict[str, str]:
    """Map each instruction to its place in the model, numbers of blocks left out."""
    found = (INSTRUCTION.match(text) for text in program.splitlines())
    return {match[1]: place(match[2]) for match in found if match}


def main() -> None:
    """Trace some steps, and print where their time went."""
    arguments = parse()
    for name in ("steps", "rows"):
        if getattr(arguments, name) < 1:
            raise SystemExit(f"--{name} {getattr(arguments, name)} must be positive")
    config = bench_config(arguments.model, arguments.batch, arguments.dtype, attention=arguments.attention)
    from mae_jax.cli import process

    use(arguments.device)
    process.set_up(config.model, config.batch_size)
    import jax

    from mae_jax.bench.step import check_device, ready_step

    check_device(arguments.device)
    ready = ready_step(config)
    for _ in range(3):
        ready.step()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            began = time.perf_counter()
            for _ in range(arguments.steps):
                ready.step()
            milliseconds = (time.perf_counter() - began) / arguments.steps * 1e3
        trace = jax.profiler.ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb"))))
    places, spent, count = origins(ready.program()), collections.Counter(), collections.Counter()
    planes = list(trace.planes)
    # Of a GPU only its own: threads of the host that launch its operations may name them too.
    for plane in [plane for plane in planes if plane.name.startswith("/device:GPU")] or planes:
        for thread in plane.lines:
            for event in thread.events:
                name = dict(event.stats).get("hlo_op")
                if name is not None:
                    # A fusion goes by its kind: its number means nothing.
                    row = str(name).partition(".")[0], places.get(str(name), "")
                    spent[row] += event.duration_ns / 1e6 / arguments.steps
                    count[row] += 1
    total = spent.total()
    if not total:
        sys.exit("the profiler has recorded no operation")
    lines = [
        f"{arguments.model}, batch {arguments.batch}, {arguments.dtype}, on {ready.device}, {ready.version}: "
        f"{milliseconds:.2f} ms a step while profiled, {total:.2f} ms of operations",
        f"{'ms':>9}{'share':>7}{'times':>7}  operation, where it comes from",
    ]
    for (kind, origin), spent_here in spent.most_common(arguments.rows):
        times = count[kind, origin] / arguments.steps
        lines.append(f"{spent_here:9.3f}{spent_here / total:7.1%}{times:7.0f}  {kind}  {origin}")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(ended(main))
