"""Parameters out of checkpoints, and into ones without a run behind them: the optimizer's state stays behind."""

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from mae_jax.config import FinetuneConfig, PretrainConfig, RunConfig
from mae_jax.errors import StatedError
from mae_jax.train.fingerprint import check_fingerprint, fingerprint
from mae_jax.train.objective import Params
from mae_jax.train.quiet import quiet_threads
from mae_jax.train.steps import init_state
from mae_jax.train.workdir import RECORD, config_to_dict, find_checkpoint, read_record


class Exported(NamedTuple):
    """What a checkpoint without a run behind it holds; its names are those of TrainState."""

    params: Params


def save_params(path: Path, config: RunConfig, params: Params) -> None:
    """Write parameters, of the whole model or of its encoder alone, as a checkpoint that `load_params` reads."""
    exported = Exported(jax.tree.map(jnp.asarray, params))
    record = {"config": config_to_dict(config), "fingerprint": fingerprint(exported)}
    with quiet_threads(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(exported), **{RECORD: ocp.args.JsonSave(record)})
        writer.save(path.absolute(), args=arguments)


def load_params(
    run_or_checkpoint: str | Path, part: Literal["all", "encoder"] = "encoder"
) -> tuple[PretrainConfig, Params, int]:
    """Configuration, parameters (their running average where the run keeps one) and step of a pretraining checkpoint.

    The optimizer's state is not read. A checkpoint that was ported may hold the encoder alone; its step is 0.

    Raises:
      StatedError: there is no checkpoint, it cannot be read, it is a classifier's, or it has no decoder and `part`
        all asks for one.
    """
    config, params, step = load_any(run_or_checkpoint)
    if not isinstance(config, PretrainConfig):
        raise StatedError(f"{run_or_checkpoint} holds a classifier, and this needs a pretraining run")
    if part == "all" and "decoder" not in params:
        raise StatedError(f"{run_or_checkpoint} holds an encoder alone, and this needs the decoder too")
    return config, params, step


def load_classifier(run_or_checkpoint: str | Path) -> tuple[FinetuneConfig, Params, int]:
    """Configuration, parameters (their running average where the run keeps one) and step of a classifier's checkpoint.

    Raises:
      StatedError: there is no checkpoint, it cannot be read, or it is a pretraining run's.
    """
    config, params, step = load_any(run_or_checkpoint)
    if not isinstance(config, FinetuneConfig):
        raise StatedError(f"{run_or_checkpoint} holds no classifier: it is a pretraining run's")
    return config, params, step


def load_any(run_or_checkpoint: str | Path) -> tuple[RunConfig, Params, int]:
    """The same of either kind. The configuration's attention is xla, whatever the run had.

    Raises:
      StatedError: there is no checkpoint, or it cannot be read.
    """
    folder = find_checkpoint(run_or_checkpoint)
    config, recorded, _ = read_record(folder)
    # A checkpoint is used where it is, which need not be a GPU.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="xla"))
    try:
        kind = "params" if config.optim.ema_decay is None else "average"
        here = SingleDeviceSharding(jax.devices()[0])
        shapes = getattr(jax.eval_shape(lambda: init_state(config)), kind)
        item = {kind: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)}
        if isinstance(config, PretrainConfig) and not any("['decoder']" in key for key in recorded):
            item[kind] = {"encoder": item[kind]["encoder"]}
        with quiet_threads(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arguments = ocp.args.PyTreeRestore(
                item=item,
                restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                partial_restore=True,
            )
            params = reader.restore(folder / "state", args=arguments)[kind]
        prefix = jax.tree_util.keystr((jax.tree_util.GetAttrKey(kind),))
        check_fingerprint(params, {key.removeprefix(prefix): value for key, value in recorded.items()})
    except Exception as error:  # whatever a damaged file makes Orbax and its layers raise
        raise StatedError(f"checkpoint {folder} cannot be read: {type(error).__name__}: {error}") from error
    return config, params, int(folder.name) if folder.name.isdigit() else 0
