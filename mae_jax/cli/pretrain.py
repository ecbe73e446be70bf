"""Pretrain a masked autoencoder."""

from collections.abc import Sequence

from mae_jax.cli import process
from mae_jax.cli.flags import end_run, prepare_jax, read_flags
from mae_jax.cli.signals import stop_on_signals


def pretrain(args: Sequence[str], prog: str) -> int:
    """Pretrain a masked autoencoder: mae-jax pretrain PRESET [--field value]. Run again, it continues."""
    from mae_jax.config import PretrainConfig
    from mae_jax.presets.pretraining import PRESETS

    # In this order: malloc and XLA's flags before JAX is imported, float64 before its first array, the cache before
    # anything is compiled.
    config = read_flags(args, prog, PretrainConfig, PRESETS)
    process.set_up(config.model, config.batch_size // config.accumulate)
    prepare_jax(config.model.dtype, hosts_may_join=True)
    from mae_jax.data.images.decode import prepare_decoder
    from mae_jax.hosts import joined
    from mae_jax.runs.pretrain import pretrain

    process.keep_programs()
    prepare_decoder()
    with joined(config) as hosts, stop_on_signals(hosts.count > 1) as stop:
        finished = pretrain(config, hosts, stop)
    return end_run(finished, args, prog)
