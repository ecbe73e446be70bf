"""Loading an encoder to evaluate: from a run or checkpoint of this project, or from a PyTorch checkpoint."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mae_jax import rng
from mae_jax.config import AugmentConfig, ModelConfig, PretrainConfig
from mae_jax.models import Params
from mae_jax.models.classifier import Classifier
from mae_jax.port.infer_config import Hints
from mae_jax.port.keys import Config, encoder_config
from mae_jax.port.read import is_run, read_weights, require_applicable
from mae_jax.storage.loading import load_params
from mae_jax.storage.workdir import find_checkpoint, read_record
from mae_jax.train.step import init_state


class Pretrained(NamedTuple):
    """Parameters, and how they are used."""

    source: str  # path of the checkpoint, or hf:OWNER/NAME
    config: Config
    params: Params  # a classifier's, or a masked autoencoder's with or without its decoder
    augment: AugmentConfig  # how pixels are normalised
    step: int | None = None  # of a run of this project, as are the next two
    run: PretrainConfig | None = None
    data: str | None = None  # that it was trained on

    @property
    def model(self) -> ModelConfig:
        return encoder_config(self.config)


def load_pretrained(source: str, encoder_heads: int | None = None, log: Callable[[str], None] = print) -> Pretrained:
    """Load the newest checkpoint of a run, one checkpoint, or any PyTorch checkpoint that `mae-jax port` reads.

    log: called with each note on what was assumed, changed or left out in reading.

    Raises:
      StatedError: it cannot be read, its attention heads are neither in it nor given, or they are given for a run,
        whose record has them.
    """
    augment = data = None
    hints = Hints(encoder_heads=encoder_heads)
    if is_run(source):
        checkpoint = find_checkpoint(source)
        kept = read_record(checkpoint).config
        if kept.kind == "pretraining":
            require_applicable(hints, kept, Path(source))
            run, params, step = load_params(checkpoint)
            return Pretrained(str(checkpoint), run.model, params, run.augment, step, run, run.data)
        augment, data = kept.augment, kept.data
    # The decoder plays no part, whatever its heads are.
    weights = read_weights(source, hints, fallback=Hints(decoder_heads=1))
    for note in weights.notes:
        log(f"note: {note}")
    return Pretrained(
        source if source.startswith("hf:") else os.path.abspath(source),
        weights.config,
        jax.tree.map(jnp.array, weights.params),
        augment or AugmentConfig(mean=weights.mean, std=weights.std),
        data=data,
    )


def untrained(pretrained: Pretrained) -> Params:
    """Make the parameters that a run started from; for a PyTorch checkpoint, random ones of its model (seed 0)."""
    config = pretrained.config
    if config.kind == "classifier":
        images = jnp.zeros((1, *config.model.image_hw, config.model.in_channels))
        return jax.jit(Classifier(config).init)(rng.device_key(0, "init"), images)["params"]
    return init_state(pretrained.run or PretrainConfig(model=config, augment=pretrained.augment)).params
