"""A pretraining run: the loop with pictures of reconstructions."""

import dataclasses

import jax
import numpy as np

from mae_jax.config import PretrainConfig
from mae_jax.data.evaluation import load_samples
from mae_jax.data.sources.source import Source, absolute, open_source
from mae_jax.evaluation.reconstruct import draw, reconstruct, sample_noise
from mae_jax.hosts import Hosts
from mae_jax.runs.loop import Finished
from mae_jax.runs.run import Room, run
from mae_jax.runs.target import with_fitted_target
from mae_jax.train.objective import Params
from mae_jax.train.step import TrainState

ALONE = Hosts()
PICTURED = 8  # images in the pictures of reconstructions


def pretrain(config: PretrainConfig, hosts: Hosts = ALONE) -> Finished:
    """Pretrain, or go on pretraining, in `config.workdir`; on several hosts, each of them calls this.

    Raises:
      StatedError: as `run`; or there is no such data.
    """
    config = dataclasses.replace(config, data=absolute(config.data))
    source = open_source(config.data, config.model.in_channels)
    return run(
        config,
        source,
        hosts,
        f"{len(source):,} images",
        lambda room: Pictures(config, source, room),
        lambda state, say: with_fitted_target(state, config, source, hosts, say),
    )


class Pictures:
    """Reconstructions of the first images of the source into the event file, every so many steps."""

    def __init__(self, config: PretrainConfig, source: Source, room: Room) -> None:
        self._config, self._room = config, room
        if config.reconstruct_every is not None:
            image_hw, share = config.model.image_hw, config.augment.evaluation_crop
            self._samples = load_samples(source, range(len(source)), PICTURED, image_hw, share)

    def begin(self, step: int, state: TrainState) -> None:
        """Nothing."""

    def after(self, step: int, state: TrainState, last: bool) -> None:
        """A picture, if it is time for one."""
        config, every = self._config, self._config.reconstruct_every
        if every is None or not (last or step % every == 0):
            return
        noise = sample_noise(config.seed, len(self._samples), config.model)
        params = nearby(state.params if state.average is None else state.average)
        # The few pictures are not cut over the devices as a batch is, which cuDNN's attention would need.
        model = dataclasses.replace(config.model, attention="xla")
        views = reconstruct(params, self._samples, noise, model, config.augment)
        self._room.log.picture("reconstruction", step, np.asarray(draw(views, f"step {step}")))


def nearby(params: Params) -> Params:
    """Parameters on one device of this host where they lie whole on each, else as they are: cut over devices.

    A cut model may be too large for one device; what is computed of it is then computed by all.
    """
    return jax.tree.map(lambda x: x.addressable_data(0), params) if _whole(params) else params


def _whole(params: Params) -> bool:
    return all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params))
