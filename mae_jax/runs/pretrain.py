"""A pretraining run: the loop with pictures of reconstructions."""

import dataclasses

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mae_jax.config import PretrainConfig
from mae_jax.data.evaluation import load_samples
from mae_jax.data.sources.source import Source, absolute, open_source
from mae_jax.evaluation.reconstruct import draw, reconstruct, sample_noise
from mae_jax.hosts import ALONE, Hosts
from mae_jax.models import Params
from mae_jax.runs.loop import Finished, TrainingRun
from mae_jax.runs.run import run
from mae_jax.runs.stop import StopRequest
from mae_jax.train.step import TrainState

PICTURED = 8  # images in the pictures of reconstructions


def pretrain(config: PretrainConfig, hosts: Hosts = ALONE, stop: StopRequest | None = None) -> Finished:
    """Pretrain, or go on pretraining, in `config.workdir`; on several hosts, each of them calls this.

    stop: ends it early, with a checkpoint; from a handler of signals or another thread.

    Raises:
      StatedError: as `run`; or there is no such data.
    """
    config = dataclasses.replace(config, data=absolute(config.data))
    source = open_source(config.data, config.model.in_channels)
    return run(config, source, hosts, Pictures(config, source), stop)


class Pictures:
    """Reconstructions of the first images of the source, drawn into the event file every so many steps."""

    def __init__(self, config: PretrainConfig, source: Source) -> None:
        self._config = config
        if config.reconstruct_every is not None:
            image_hw, share = config.model.image_hw, config.augment.evaluation_crop
            self._samples = load_samples(source, range(len(source)), PICTURED, image_hw, share)

    def start(self, run: TrainingRun, step: int, state: TrainState) -> None:
        """Do nothing: the picture of a step is drawn after it."""

    def after(self, run: TrainingRun, step: int, state: TrainState, last: bool) -> None:
        """Draw a picture, if it is time for one."""
        config, every = self._config, self._config.reconstruct_every
        if every is None or not (last or step % every == 0):
            return
        noise = sample_noise(config.seed, len(self._samples), config.model)
        params = nearby(state.params if state.average is None else state.average)
        # The few pictures are not cut over the devices as a batch is, which cuDNN's attention would need.
        model = dataclasses.replace(config.model, attention="xla")
        views = reconstruct(params, self._samples, noise, model, config.augment, whole_everywhere(params))
        run.log.picture("reconstruction", step, np.asarray(draw(views, f"step {step}")))


def nearby(params: Params) -> Params:
    """Take parameters from one device of this host where they lie whole on each; leave them where they are cut.

    A cut model may be too large for one device; what is computed of it is then computed by all.
    """
    whole = all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params))
    return jax.tree.map(lambda x: x.addressable_data(0), params) if whole else params


def whole_everywhere(params: Params) -> NamedSharding | None:
    """Return the sharding of a result that every host can read, of parameters that are cut over a mesh."""
    meshes = [leaf.sharding.mesh for leaf in jax.tree.leaves(params) if isinstance(leaf.sharding, NamedSharding)]
    return NamedSharding(meshes[0], PartitionSpec()) if meshes else None
