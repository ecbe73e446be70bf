"""Parameters out of checkpoints, without the run that wrote them: what evaluations and ports begin with."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from mae_jax.config import PretrainConfig, Run
from mae_jax.errors import StatedError
from mae_jax.models import Params
from mae_jax.storage.checkpoints import DamagedError, check_files, unread
from mae_jax.storage.checksums import altered
from mae_jax.storage.workdir import find_checkpoint, read_record
from mae_jax.train.step import init_state


def load_params(
    run_or_checkpoint: str | Path, part: Literal["all", "encoder"] = "encoder"
) -> tuple[PretrainConfig, Params, int]:
    """Load configuration, parameters and step of a pretraining checkpoint.

    Parameters are their running average where the run keeps one. The optimizer's state is not read. A checkpoint that
    was ported may hold the encoder alone; its step is 0.

    Raises:
      StatedError: there is no checkpoint, it cannot be read, it is a classifier's, or it has no decoder and `part`
        all asks for one.
    """
    config, params, step = load_any(run_or_checkpoint)
    if config.kind != "pretraining":
        raise StatedError(
            f"{run_or_checkpoint} holds a classifier, and this needs a pretraining run", field="checkpoint"
        )
    if part == "all" and "decoder" not in params:
        raise StatedError(
            f"{run_or_checkpoint} holds an encoder alone, and this needs the decoder too", field="checkpoint"
        )
    return config, params, step


def load_any(run_or_checkpoint: str | Path) -> tuple[Run, Params, int]:
    """Load configuration, parameters and step of either kind. The configuration's attention is xla, whatever it was.

    Raises:
      StatedError: there is no checkpoint, or it cannot be read.
    """
    folder = find_checkpoint(run_or_checkpoint)
    config, recorded, _, version, _ = read_record(folder)
    # A checkpoint is used where it is, which need not be a GPU.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="xla"))
    try:
        check_files(folder)
        kind = "params" if config.optim.ema_decay is None else "average"
        here = SingleDeviceSharding(jax.local_devices()[0])
        shapes = getattr(jax.eval_shape(lambda: init_state(config)), kind)
        item = {kind: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)}
        if config.kind == "pretraining" and not any("['decoder']" in key for key in recorded):
            item[kind] = {"encoder": item[kind]["encoder"]}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arguments = ocp.args.PyTreeRestore(
                item=item,
                restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                partial_restore=True,
            )
            params = reader.restore(folder / "state", args=arguments)[kind]
        prefix = jax.tree_util.keystr((jax.tree_util.GetAttrKey(kind),))
        named = {key.removeprefix(prefix): value for key, value in recorded.items()}
        if wrong := altered(params, named, version):
            raise DamagedError(wrong, field="checkpoint")
    except Exception as error:  # whatever Orbax and its layers raise
        raise StatedError(f"checkpoint {folder} cannot be read: {unread(error)}", field="checkpoint") from error
    return config, params, int(folder.name) if folder.name.isdecimal() else 0
