"""Weights of another model to start from."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.config import ClassifierConfig, FinetuneConfig, ModelConfig, RunConfig
from mae_jax.errors import StatedError
from mae_jax.models.positions import fixed_positions
from mae_jax.port.infer_config import Hints
from mae_jax.port.keys import encoder_config
from mae_jax.port.read import is_run, read_weights
from mae_jax.port.weights import Weights
from mae_jax.storage.workdir import find_checkpoint, read_record
from mae_jax.train.objective import Params
from mae_jax.train.step import TrainState

Say = Callable[[str], None]


def start_from(source: str, state: TrainState, config: RunConfig, say: Say, whole: bool = False) -> TrainState:
    """The state before the first step with the weights of `source`, wherever its arrays lie.

    A decoder or a head that the source does not have, or has in another size or for another target, stays random,
    unless the `whole` is asked for; positions are fitted to the image. With a decoder of principal coefficients comes
    the basis that they are in.

    Raises:
      StatedError: there are no such weights, or their encoder is another one.
    """
    model = config.model
    known = Hints(model.encoder.heads, model.decoder.heads)
    weights = read_weights(source, fallback=known, image_size=model.image_size)
    found = encoder_config(weights.config)
    for note in weights.notes:
        say(f"{source}: {note}")
    if found.encoder.heads != model.encoder.heads:
        raise StatedError(f"init {source} has {found.encoder.heads} encoder heads, this run {model.encoder.heads}")
    if found.positions != model.positions != "learned":
        raise StatedError(
            f"init {source} has positions {found.positions}, this run {model.positions}: "
            f"continue with --model.positions {found.positions}"
        )
    here = config.augment.mean, config.augment.std
    if not weights.normalisation_told:
        say(f"{source} does not say how its images were normalised; taken as this run's, mean {here[0]}, std {here[1]}")
    elif (weights.mean, weights.std) != here:
        say(
            f"WARNING: images of {source} were normalised with mean {weights.mean} and std {weights.std}, "
            f"this run's with {here[0]} and {here[1]}"
        )
    given = _encoder(weights.params["encoder"], state.params["encoder"], source, say)
    if model.positions == "learned" and "pos_embed" not in given:
        say(f"the {found.positions} positions of {source} are learnt from here on")
        given |= {
            "pos_embed": fixed_positions(found.positions, found.encoder.width, model.grid, model.class_token)[None]
        }
    wrong = _differing(given, state.params["encoder"])
    if wrong:
        raise StatedError(f"init {source} has another encoder than this run: {wrong[0]} ({len(wrong)} differ)")
    params = state.params | {"encoder": _like(given, state.params["encoder"])}
    if isinstance(config, FinetuneConfig):
        params |= _head(weights, config, params, source, say, whole)
    else:
        params |= _decoder(weights, model, params, source, say)
    return state._replace(params=params, average=None if state.average is None else jax.tree.map(jnp.copy, params))


def adopted(config: FinetuneConfig, source: str) -> FinetuneConfig:
    """The configuration with the encoder that `source` has, and images of its size and normalised as its were.

    A recipe that learns positions goes on to: it begins with those of the source.

    Raises:
      StatedError: it cannot be read, or does not go with the rest.
    """
    if is_run(Path(source)):
        run = read_record(find_checkpoint(source)).config
        found, normalisation = run.model, (run.augment.mean, run.augment.std)
    else:
        known = Hints(config.model.encoder.heads, config.model.decoder.heads)
        weights = read_weights(source, fallback=known)
        found, normalisation = encoder_config(weights.config), (config.augment.mean, config.augment.std)
        if weights.normalisation_told:
            normalisation = weights.mean, weights.std
    positions = "learned" if config.model.positions == "learned" else found.positions
    own = {name: getattr(config.model, name) for name in ("dtype", "remat", "attention")}
    try:
        model = replace(found, positions=positions, encoder_mask_tokens=False, **own)
        augment = replace(config.augment, mean=normalisation[0], std=normalisation[1])
        return replace(config, model=model, augment=augment)
    except ValueError as error:
        raise StatedError(f"the encoder of {source} does not go with this recipe: {error}") from error


def _encoder(given: Params, wanted: Params, source: str, say: Say) -> Params:
    """The encoder as this run has it: what only a masked autoencoder needs of it, or only a classifier, put right."""
    given = {name: part for name, part in given.items() if name in wanted or name not in ("norm", "mask_token")}
    if "norm" in wanted and "norm" not in given:
        say(f"{source} has no LayerNorm behind its blocks: that is new")
        given |= {"norm": wanted["norm"]}
    return given


def _decoder(weights: Weights, model: ModelConfig, params: Params, source: str, say: Say) -> Params:
    found = encoder_config(weights.config)
    same = (found.decoder.heads, found.pca_components) == (model.decoder.heads, model.pca_components)
    if "decoder" not in weights.params:
        say(f"starting from the encoder of {source}, which has no decoder; that is new")
    elif same and not _differing(weights.params["decoder"], params["decoder"]):
        say(f"starting from the encoder and the decoder of {source}")
        carried = ("decoder",) if model.pca_components is None else ("decoder", "target")
        return {name: _like(weights.params[name], params[name]) for name in carried}
    else:
        say(f"starting from the encoder of {source}; its decoder is another one: that is new")
    return {}


def _head(weights: Weights, config: FinetuneConfig, params: Params, source: str, say: Say, whole: bool) -> Params:
    given, behind = weights.config, [name for name in ("fc_norm", "head") if name in params]
    same = isinstance(given, ClassifierConfig) and not config.sweep and given.pooling == config.pooling
    same = same and (whole or not config.batch_norm)  # what it saw is not what a new BatchNorm gives
    if same and not any(_differing(weights.params[name], params[name]) for name in behind):
        say(f"starting from the encoder and the head of {source}")
        return {name: _like(weights.params[name], params[name]) for name in behind}
    if whole:
        wanted = f"a head of {config.classes} classes on pooling {config.pooling}"
        has = "no head"
        if isinstance(given, ClassifierConfig):
            has = f"a head of {given.classes} classes on pooling {given.pooling} (--pooling {given.pooling})"
        raise StatedError(f"{source} has {has}, and {wanted} is to be evaluated")
    say(f"starting from the encoder of {source}; the head is new")
    return {}


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _differing(given: Params, wanted: Params) -> list[str]:
    """Parameters that one has and the other has not, or in another shape."""
    have, want = _shapes(given), _shapes(wanted)
    return [
        f"{name} is {have.get(name, 'missing')}, not {want.get(name, 'wanted')}"
        for name in sorted(have.keys() | want.keys())
        if have.get(name) != want.get(name)
    ]


def _like(given: Params, wanted: Params) -> Params:
    """The given values in the dtype and place of the wanted ones."""
    return jax.tree.map(lambda x, like: jax.device_put(np.asarray(x, like.dtype), like.sharding), given, wanted)
