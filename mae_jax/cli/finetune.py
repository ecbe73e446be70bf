"""Fine-tune an encoder, or train linear heads on a frozen one."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from mae_jax.cli import process
from mae_jax.cli.flags import end_run, plain, prepare_jax, read_flags
from mae_jax.cli.signals import stop_on_signals
from mae_jax.config import FinetuneConfig
from mae_jax.presets.transfer import FINETUNE, PROBE


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneFlags(FinetuneConfig):
    """The fields of a run of a classifier, and the command's own."""

    eval_only: bool = False  # evaluate the weights of --init as they are; nothing is trained


def finetune(args: Sequence[str], prog: str) -> int:
    """Fine-tune an encoder with a head: mae-jax finetune PRESET --init RUN_OR_CHECKPOINT [--eval-only]."""
    return _train(args, prog, FINETUNE)


def probe(args: Sequence[str], prog: str) -> int:
    """Train linear heads on a frozen encoder: mae-jax probe PRESET --init RUN_OR_CHECKPOINT [--sweep RATES]."""
    return _train(args, prog, PROBE)


def _adopt(config: FinetuneConfig, init: str) -> FinetuneConfig:
    from mae_jax.runs.initial import adopted

    return adopted(config, init)


def _train(args: Sequence[str], prog: str, presets: Mapping[str, Callable[[], FinetuneConfig]]) -> int:
    flags = read_flags(args, prog, FinetuneFlags, presets, _adopt)
    config = plain(flags, FinetuneConfig)
    process.set_up(config.model, config.batch_size // config.accumulate)
    prepare_jax(config.model.dtype, hosts_may_join=True)
    from mae_jax.data.images.decode import prepare_decoder
    from mae_jax.hosts import joined
    from mae_jax.runs.finetune import EVALUATED, evaluate, finetune

    process.keep_programs()
    prepare_decoder()
    with joined(config) as hosts:
        if not flags.eval_only:
            with stop_on_signals(hosts.count > 1) as stop:
                finished = finetune(config, hosts, stop)
            return end_run(finished, args, prog)
        outcomes = evaluate(config, hosts)
        top1, top5 = outcomes.top(1)[0], outcomes.top(5)[0]
        left_out = f"; {outcomes.left_out} left out" if outcomes.left_out else ""
        if hosts.first:
            print(f"top-1 {top1:.2%}, top-5 {top5:.2%} of {len(outcomes.label):,} images{left_out}")
            print(f"wrote confusion.png and worst.png into {config.workdir}/{EVALUATED}")
    return 0
