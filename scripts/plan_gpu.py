"""Compile a training step for a GPU on a machine that has none, and print its memory and the bytes that it moves.

    pip install "jax[cuda12]"       # the compiler; neither a driver nor a GPU is needed
    python scripts/plan_gpu.py --gpu h200 --model vit_huge_patch14 --batch 256 --attention cudnn

Memory is what the compiler plans, without what libraries ask for beside it. Nothing is timed but the compilation, on
this machine's CPU and without the trials of kernels that it makes on a card. Bytes are those of each operation's
operands and results, read and written once: what a fusion saves shows, what a cache saves does not.
"""

import argparse
import collections
import functools
import os
import sys
import time
from typing import Any

from ended import ended

from mae_jax.bench.program import operations
from mae_jax.bench.recipe import bench_config
from mae_jax.config import PretrainConfig
from mae_jax.errors import StatedError

# Bytes of memory as CUDA reports them, and bytes a second by NVIDIA's data sheets (SXM); the rest the two cards share.
GPUS = {"h100": ("NVIDIA H100 80GB HBM3", 84_929_347_584, 3.352e12), "h200": ("NVIDIA H200", 151_397_597_184, 4.8e12)}
HOPPER = """gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  l2_cache_size: 52428800  device_memory_size: {memory}  memory_bandwidth: {bandwidth}
}}
platform_name: "CUDA"  device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 10 }}  runtime_version {{ major: 12 minor: 8 patch: 0 }}
"""


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="A step as it is compiled for a GPU that is not here.")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h200")
    parser.add_argument("--model", default="vit_large_patch16", help="a model, or the name of a preset")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla")
    parser.add_argument("--remat", action="store_true", help="recompute blocks in the backward pass")
    parser.add_argument("--mask-tokens", action="store_true", help="in the encoder (Table 1c)")
    parser.add_argument("--rows", type=int, default=40)
    return parser.parse_args()


def compiled_for(gpu: str, config: PretrainConfig) -> tuple[Any, float]:
    """Compile the step, and return it with the seconds that this took.

    Raises:
      StatedError: the compiler for GPUs is not installed.
    """
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from mae_jax.train.build import state_shapes
    from mae_jax.train.objective import Batch
    from mae_jax.train.step import make_step

    name, memory, bandwidth = GPUS[gpu]
    target = HOPPER.format(name=name, memory=memory, bandwidth=int(bandwidth))
    try:
        topology = topologies.get_topology_desc(gpu, "cuda", target_config=target, topology="1x1x1")
    except NotImplementedError as error:
        raise StatedError('there is no compiler for GPUs here: pip install "jax[cuda12]"', field="gpu") from error
    sharding = NamedSharding(Mesh(topology.devices, ("device",)), PartitionSpec())
    there = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    state = jax.tree.map(lambda x: there(x.shape, x.dtype), state_shapes(config))
    images = (config.batch_size, *config.model.image_hw, config.model.in_channels)
    batch = Batch(there(images, np.uint8), there(images[:1], np.uint32))
    step = jax.jit(make_step(config, steps_per_epoch=1000.0, epochs=100.0), donate_argnums=0)
    lowered = step.lower(state, batch)
    began = time.perf_counter()
    return lowered.compile(), time.perf_counter() - began


def table(compiled: Any, title: str, rows: int) -> str:
    """Format memory, sums, and operations by the bytes that they move."""
    planned = compiled.memory_analysis()
    kept, temporary = planned.argument_size_in_bytes, planned.temp_size_in_bytes
    new = planned.output_size_in_bytes - planned.alias_size_in_bytes
    found = list(operations(compiled.as_text()))
    moved = sum(operation.moved for operation in found)
    flops = sum(operation.flops for operation in found)
    lines = [
        title,
        f"memory: {(kept + temporary + new) / 1e9:.1f} GB, of which state and batch {kept / 1e9:.1f}",
        f"operations: {len(found)}, moving {moved / 1e9:.1f} GB; their matrix products {flops / 1e12:.2f} TFLOP",
        f"{'GB':>8}{'share':>7}{'TFLOP':>8}{'times':>7}  operation, where it comes from",
    ]
    bytes_of, flops_of, times = collections.Counter(), collections.Counter(), collections.Counter()
    for operation in found:
        row = operation.kind, operation.place
        bytes_of[row] += operation.moved
        flops_of[row] += operation.flops
        times[row] += 1
    for row, count in bytes_of.most_common(rows):
        lines.append(
            f"{count / 1e9:8.3f}{count / moved:7.1%}{flops_of[row] / 1e12:8.2f}{times[row]:7}  {row[0]}  {row[1]}"
        )
    return "\n".join(lines)


def main() -> None:
    """Compile a step for the GPU that is asked for, and print the plan."""
    arguments = parse()
    if arguments.rows < 1:
        raise SystemExit(f"--rows {arguments.rows} must be positive")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # which would look for a driver
    os.environ["JAX_PLATFORMS"] = "cpu"  # for all but the compilation
    config = bench_config(
        arguments.model,
        arguments.batch,
        arguments.dtype,
        arguments.mask_tokens,
        arguments.remat,
        arguments.attention,
    )
    compiled, seconds = compiled_for(arguments.gpu, config)
    import jax

    words = [arguments.model, f"batch {arguments.batch}", arguments.dtype, f"attention {arguments.attention}"]
    words += ["blocks recomputed"] * arguments.remat + ["mask tokens in the encoder"] * arguments.mask_tokens
    title = f"{', '.join(words)}, for {GPUS[arguments.gpu][0]}, jax {jax.__version__}: compiled in {seconds:.0f} s"
    print(table(compiled, title, arguments.rows))


if __name__ == "__main__":
    sys.exit(ended(main))
