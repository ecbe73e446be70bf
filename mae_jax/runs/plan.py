"""What a run will cost, before anyone pays for it: memory, FLOPs, traffic and time of a step that is not run.

The step is compiled for as many simulated CPU devices as the plan has. Memory of the state, FLOPs and traffic follow
from shapes; memory of activations is what XLA's CPU compiler plans for: an accelerator's compiler, which fuses more and
keeps bfloat16 as it is, needs less.
"""

import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mae_jax.config import ModelConfig, PretrainConfig
from mae_jax.errors import StatedError
from mae_jax.models.flops import training_flops
from mae_jax.train.build import Length, build_engine, state_shapes
from mae_jax.train.mesh import DATA, SHARD, MeshEngine
from mae_jax.train.objective import Batch

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}

# He et al. 2021, Table 2: hours of 800 epochs on 128 TPU-v3 cores, by encoder width and depth: with mask tokens in the
# encoder, without, and without and with a decoder of one block. A core's peak is half a chip's 123 TFLOP/s in bfloat16.
PAPER_HOURS = {(1024, 24): (42.4, 15.4, 11.6), (1280, 32): (119.6, 34.5, 29.3)}
TRIES = 3  # steps that are compiled in search of the largest batch
PAPER_FLOPS, PAPER_IMAGES = 128 * 61.5e12, 800 * 1_281_167


class Memory(NamedTuple):
    """Of one device, in bytes."""

    params: int
    optimizer: int  # both moments, and the running average if there is one
    batch: int
    activations: int  # whatever else the compiled step needs at once, gradients among it

    @property
    def total(self) -> int:
        return sum(self)


def parse_bytes(text: str) -> int:
    """Read a number of bytes, such as `40GiB`.

    Raises:
      StatedError: it is no such number, or not one byte.
    """
    found = re.fullmatch(rf"([0-9]*\.?[0-9]+) ?({'|'.join(UNITS)})", text)
    if found is None or not (count := int(float(found[1]) * UNITS[found[2]])):
        raise StatedError(
            f"memory {text} is not a positive number with one of {', '.join(UNITS)}, such as 40GiB", field="memory"
        )
    return count


def show_bytes(count: float) -> str:
    """Write a number of bytes in the unit that suits."""
    unit = [name for name in ("B", "KiB", "MiB", "GiB", "TiB") if UNITS[name] <= max(count, 1)][-1]
    return f"{count / UNITS[unit]:.3g} {unit}"


def bytes_a_device(shapes: Any, shardings: Any) -> int:
    """Count the bytes of arrays as they lie on one device."""
    parts = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, shapes, shardings)
    return sum(jax.tree.leaves(parts))


def mesh_config(config: PretrainConfig) -> PretrainConfig:
    """Put a run on CPU devices under a mesh: pmap needs the memory and traffic of jit, cuDNN's attention less."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="xla"))
    return dataclasses.replace(config, engine="jit") if config.engine == "pmap" else config


def measure(config: PretrainConfig) -> tuple[Memory, MeshEngine]:
    """Compile the step of a run and take its memory apart; nothing is computed."""
    config = mesh_config(config)
    engine = build_engine(config, Length(100, 10.0, 10.0))
    assert isinstance(engine, MeshEngine)
    shapes = state_shapes(config)
    shardings = engine.shardings(shapes)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    rows, model = NamedSharding(engine.mesh, PartitionSpec((DATA, SHARD))), config.model
    on_device = config.crops == "device"  # whole images come in, squeezed into a square, and a box for each
    image_hw = (config.canvas, config.canvas) if on_device else model.image_hw
    like = Batch(
        np.empty((0, *image_hw, model.in_channels), np.uint8),
        np.empty(0, np.uint32),
        np.empty((0, 5), np.float32) if on_device else None,
    )
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), x.dtype, sharding=rows), like
    )
    compiled = engine.step.lower(state, batch).compile()  # type: ignore[attr-defined]
    planned = compiled.memory_analysis()
    new = planned.output_size_in_bytes - planned.alias_size_in_bytes
    params, whole = bytes_a_device(shapes.params, shardings.params), bytes_a_device(shapes, shardings)
    images = planned.argument_size_in_bytes - whole
    return Memory(params, whole - params, images, planned.temp_size_in_bytes + new), engine


def traffic(config: PretrainConfig, devices: int, fsdp: int) -> float:
    """Count the bytes that one device sends in a step, by ring algorithms.

    Cut over `fsdp` devices, weights are gathered forward and backward and gradients scattered, each of which sends
    (fsdp - 1) / fsdp of all bytes; the gradient of what a device keeps is then summed over the other groups.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state_shapes(mesh_config(config)).params))
    groups = devices // fsdp
    gathered = 3 * size * (fsdp - 1) / fsdp * config.accumulate
    return gathered + 2 * (size / fsdp) * (groups - 1) / groups


def largest_batch(config: PretrainConfig, used: Memory, devices: int, limit: int) -> int:
    """Find a global batch that fits into `limit` bytes a device, within a few percent of the largest; 0 if none does.

    Memory is nearly a line in the batch: each guess is where the line through the last compiled step, or the last two,
    meets the limit, and the step is compiled for it to see. used: of the step for `config.batch_size`.
    """
    unit = devices * config.accumulate
    tried = {0: used.params + used.optimizer, config.batch_size // unit: used.total}
    for _ in range(TRIES):
        (low, least), (high, most) = sorted(tried.items(), key=lambda pair: abs(pair[1] - limit))[:2]
        guess = max(0, math.floor(low + (limit - least) * (high - low) / ((most - least) or 1)))
        if guess in tried:
            break
        tried[guess] = measure(dataclasses.replace(config, batch_size=guess * unit))[0].total
    return max([rows * unit for rows, total in tried.items() if total <= limit], default=0)


def paper_rows(model: ModelConfig) -> list[str]:
    """List the hours that the paper measured beside those that its machine would take at its peak, for its models."""
    hours = PAPER_HOURS.get((model.encoder.width, model.encoder.depth))
    if hours is None:
        return []
    plain = dataclasses.replace(model, encoder_mask_tokens=False, decoder=dataclasses.replace(model.decoder, depth=8))
    with_tokens = dataclasses.replace(plain, encoder_mask_tokens=True)
    shallow = dataclasses.replace(plain, decoder=dataclasses.replace(plain.decoder, depth=1))
    variants = {"mask tokens in the encoder": with_tokens, "none": plain, "none, decoder of 1 block": shallow}
    rows = ["800 epochs on 128 TPU-v3 cores: hours at their peak, measured in the paper (Table 2), share of the peak"]
    for (name, variant), measured in zip(variants.items(), hours, strict=True):
        peak = PAPER_IMAGES * training_flops(variant) / PAPER_FLOPS / 3600
        rows.append(f"  {name:28} {peak:6.1f} h  {measured:6.1f} h  {peak / measured:4.0%}")
    ratio = training_flops(with_tokens) / training_flops(plain)
    return [
        *rows,
        f"FLOPs with mask tokens in the encoder over without: {ratio:.2f}; of patches alone, without the class token, "
        f"{mask_token_ratio(plain):.2f} (the paper's Table 1c says 3.3 for ViT-L)",
    ]


def mask_token_ratio(model: ModelConfig) -> float:
    """Divide FLOPs with mask tokens in the encoder by those without, of patches alone: the class token is left out."""
    bare = dataclasses.replace(model, class_token=False)
    return training_flops(dataclasses.replace(bare, encoder_mask_tokens=True)) / training_flops(bare)


def plan(config: PretrainConfig, memory: int, flops: float, bandwidth: float) -> str:
    """Write a plan, in lines.

    memory: bytes of a device. flops, bandwidth: FLOP and bytes that it computes and sends in a second.

    Raises:
      StatedError: one of them is not positive and finite, or the run could not start.
    """
    for name, value in {"flops": flops, "bandwidth": bandwidth}.items():
        if not 0 < value < math.inf:
            raise StatedError(f"{name} {value} of a device must be positive and finite", field=name)
    used, engine = measure(config)
    devices, fsdp = len(engine.devices), engine.mesh.shape[SHARD]
    work = training_flops(config.model) * config.batch_size
    sent = traffic(config, devices, fsdp)
    seconds = work / devices / flops + sent / bandwidth
    largest = largest_batch(config, used, devices, memory)
    fits = "fits" if used.total <= memory else "DOES NOT FIT"
    return "\n".join(
        [
            f"engine {config.engine}, {devices} devices, state cut {fsdp} ways, batch {config.batch_size}; a device:",
            f"  parameters            {show_bytes(used.params)}",
            f"  optimizer             {show_bytes(used.optimizer)}",
            f"  batch                 {show_bytes(used.batch)}",
            f"  activations           {show_bytes(used.activations)}",
            f"  in all                {show_bytes(used.total)} of {show_bytes(memory)}: {fits}",
            f"  sent in a step        {show_bytes(sent)}",
            f"FLOPs of a step         {work:.3g}",
            f"steps/s                 {1 / seconds:.3g} at {flops:.3g} FLOP/s and {bandwidth:.3g} byte/s a device, "
            "nothing overlapped",
            f"largest batch that fits {largest:,}, within a few percent",
            *paper_rows(config.model),
        ]
    )
