"""Time the training step."""

from typing import Literal

import tyro

from mae_jax.cli.flags import command, prepare_jax


@command
def bench(
    model: tyro.conf.Positional[str],
    /,
    batches: tuple[int, ...] = (64,),
    dtype: Literal["float32", "bfloat16", "float64"] = "float32",
    mask_tokens: Literal["none", "encoder", "both"] = "none",
    remat: bool = False,
    attention: Literal["xla", "cudnn"] = "xla",
    steps: int = 30,
    warmup: int = 3,
    json: bool = False,
) -> int:
    """Time the training step on one device: mae-jax bench MODEL --batches 256 --dtype bfloat16.

    Medians, FLOP/s from the model's definition, and their share of what the device multiplies at its best.

    Args:
      model: vit_small_patch16, vit_base_patch16, vit_large_patch16, vit_huge_patch14, or the model of a preset.
      batches: Images in a step; several are timed in a process each.
      dtype: Of matrix products.
      mask_tokens: The encoder sees mask tokens (the paper's Table 1c), or not, or both one after the other.
      remat: Recompute each block in the backward pass.
      attention: What computes it; cudnn needs bfloat16 and an NVIDIA GPU of compute capability 8.0 or more.
      steps: Timed steps.
      warmup: Steps before them.
      json: Print a line of JSON for each row in place of the table.
    """
    from mae_jax.bench.recipe import bench_config
    from mae_jax.cli import process

    if len(batches) == 1 and mask_tokens != "both":  # else in the processes that time, which inherit the environment
        timed = bench_config(model, batches[0], dtype, mask_tokens == "encoder", remat, attention)
        process.set_up(timed.model, timed.batch_size)
    prepare_jax(dtype)
    from mae_jax.bench.run import rows, show

    return show(rows(model, batches, dtype, mask_tokens, remat, attention, steps, warmup), model, json)
