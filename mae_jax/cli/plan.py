"""Say what a pretraining run would cost."""

import dataclasses
import os
from collections.abc import Sequence

from mae_jax.cli.flags import plain, prepare_jax, read_flags
from mae_jax.config import PretrainConfig
from mae_jax.presets.pretraining import PRESETS


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanFlags(PretrainConfig):
    """The fields of a pretraining run, and what is known of a device."""

    memory: str = "40GiB"  # of a device
    flops: float = 1.5e14  # FLOP a second of a device
    bandwidth: float = 1e11  # bytes a second that a device sends


def plan(args: Sequence[str], prog: str) -> int:
    """Say what a run would cost, without running it: mae-jax plan PRESET --engine fsdp --devices 64 --memory 40GiB.

    Every field of `pretrain` is a flag here too; --devices counts all devices of all hosts.
    """
    flags = read_flags(args, prog, PlanFlags, PRESETS)
    config = plain(flags, PretrainConfig)
    simulated = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={config.devices or 1}"
    os.environ |= {"XLA_FLAGS": simulated, "JAX_PLATFORMS": "cpu"}
    prepare_jax(config.model.dtype)
    from mae_jax.runs.plan import parse_bytes
    from mae_jax.runs.plan import plan as make_plan

    print(make_plan(config, parse_bytes(flags.memory), flags.flops, flags.bandwidth))
    return 0
