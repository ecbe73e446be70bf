"""Commands that train, and the one that says what that would cost."""

import argparse
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from mae_jax.commands.flags import read_config
from mae_jax.commands.precision import prepare_jax

if TYPE_CHECKING:
    from mae_jax.config import FinetuneConfig, PretrainConfig
    from mae_jax.train.loop import Finished


def _read_pretraining(args: Sequence[str], prog: str) -> "PretrainConfig":
    from mae_jax.config import PretrainConfig
    from mae_jax.presets import PRESETS

    return read_config(args, prog, PretrainConfig, PRESETS)


def _ended(finished: "Finished", args: Sequence[str], prog: str) -> int:
    """Say how a run ended, and the exit code for it."""
    print(f"step {finished.step} is saved in {finished.workdir}")
    if finished.signal is None:
        return 0
    print(f"stopped by {finished.signal.name}; to continue: {shlex.join([*prog.split(), *args])}")
    return 128 + finished.signal


def pretrain(args: Sequence[str], prog: str) -> int:
    """Pretrain a masked autoencoder: mae-jax pretrain PRESET [--field value]. Run again, it continues."""
    from mae_jax.train import cpu

    config = _read_pretraining(args, prog)
    cpu.settle(config.model, config.batch_size // config.accumulate)
    prepare_jax(config.model.dtype)
    from mae_jax.train.compiled import keep_compiled
    from mae_jax.train.hosts import joined
    from mae_jax.train.memory import too_little_is_told
    from mae_jax.train.pretrain import pretrain

    keep_compiled()
    with joined(config) as hosts, too_little_is_told(config):
        finished = pretrain(config, hosts)
    return _ended(finished, args, prog)


def finetune(args: Sequence[str], prog: str) -> int:
    """Fine-tune an encoder with a head: mae-jax finetune PRESET --init RUN_OR_CHECKPOINT [--eval-only]."""
    from mae_jax.presets import FINETUNE

    return _transfer(args, prog, FINETUNE)


def probe(args: Sequence[str], prog: str) -> int:
    """Train linear heads on a frozen encoder: mae-jax probe PRESET --init RUN_OR_CHECKPOINT [--sweep RATES]."""
    from mae_jax.presets import PROBE

    return _transfer(args, prog, PROBE)


def _transfer(args: Sequence[str], prog: str, presets: "Mapping[str, Callable[[], FinetuneConfig]]") -> int:
    from mae_jax.config import FinetuneConfig
    from mae_jax.train import cpu

    def adopt(config: FinetuneConfig, init: str) -> FinetuneConfig:
        from mae_jax.train.initial import adopted

        return adopted(config, init)

    words = [word for word in args if word != "--eval-only"]
    config = read_config(words, f"{prog} [--eval-only]", FinetuneConfig, presets, adopt)
    cpu.settle(config.model, config.batch_size // config.accumulate)
    prepare_jax(config.model.dtype)
    from mae_jax.train.compiled import keep_compiled
    from mae_jax.train.finetune import EVALUATED, evaluate, finetune
    from mae_jax.train.hosts import joined
    from mae_jax.train.memory import too_little_is_told

    keep_compiled()
    with joined(config) as hosts, too_little_is_told(config):
        if len(words) < len(args):
            outcomes = evaluate(config, hosts)
            top1, top5 = outcomes.top(1)[0], outcomes.top(5)[0]
            left_out = f"; {outcomes.left_out} left out" if outcomes.left_out else ""
            if hosts.first:
                print(f"top-1 {top1:.2%}, top-5 {top5:.2%} of {len(outcomes.label):,} images{left_out}")
                print(f"wrote confusion.png and worst.png into {config.workdir}/{EVALUATED}")
            return 0
        finished = finetune(config, hosts)
    return _ended(finished, args, prog)


def plan(args: Sequence[str], prog: str) -> int:
    """Say what a run would cost, without running it: mae-jax plan PRESET --engine fsdp --devices 64 --memory 40GiB.

    Every field of `pretrain` is a flag here too; --devices counts all devices of all hosts.
    """
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--memory", default="40GiB")
    parser.add_argument("--flops", type=float, default=1.5e14)
    parser.add_argument("--bandwidth", type=float, default=1e11)
    own, rest = parser.parse_known_args(args)
    config = _read_pretraining(rest, f"{prog} [--memory 40GiB] [--flops 1.5e14] [--bandwidth 1e11]")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={config.devices or 1}"
    os.environ |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    prepare_jax(config.model.dtype)
    from mae_jax.train.plan import parse_bytes
    from mae_jax.train.plan import plan as make_plan

    print(make_plan(config, parse_bytes(own.memory), own.flops, own.bandwidth))
    return 0
