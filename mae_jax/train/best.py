"""The best of a run's evaluations, kept as a checkpoint of its own."""

import shutil
from pathlib import Path

from mae_jax.config import RunConfig
from mae_jax.errors import StatedError
from mae_jax.train.hosts import Hosts
from mae_jax.train.objective import Params
from mae_jax.train.saved_params import save_params
from mae_jax.train.workdir import CHECKPOINTS, checkpoint_folders

BEST = "best"


def drop_later(workdir: Path, step: int, hosts: Hosts) -> None:
    """Remove what a run kept after the step from which it goes on: it may come out otherwise. All hosts call this."""
    if hosts.first:
        for saved in checkpoint_folders(workdir / BEST):
            if int(saved.name) > step:
                shutil.rmtree(saved)
    hosts.gather(f"best from {step}", "")


def save_best(workdir: Path, step: int, config: RunConfig, params: Params, hosts: Hosts) -> None:
    """Write parameters to WORKDIR/best, which commands take as they take a run; the one before goes then.

    On several hosts all of them call this.

    Raises:
      StatedError: it cannot be written.
    """
    folder = workdir / BEST
    if any(int(saved.name) == step for saved in checkpoint_folders(folder)):
        return  # by the same run, which was stopped after it
    try:
        save_params(folder / CHECKPOINTS / str(step), config, params)
        hosts.gather(f"best {step}", "")
        if hosts.first:
            for saved in checkpoint_folders(folder):
                if int(saved.name) != step:
                    shutil.rmtree(saved)
    except (OSError, ValueError) as error:
        if hosts.watch is not None:
            hosts.watch.let_the_gone_be_named()
        raise StatedError(
            f"the best checkpoint cannot be written into {folder}: {str(error).splitlines()[0][:300]}. "
            "Make room there, and run the same command again."
        ) from error
