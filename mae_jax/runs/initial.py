"""Weights of another model to start from."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.config import FinetuneConfig, ModelConfig, Run
from mae_jax.errors import StatedError
from mae_jax.models import Params
from mae_jax.models.patches import fixed_positions
from mae_jax.port.infer_config import Hints
from mae_jax.port.keys import encoder_config
from mae_jax.port.read import is_run, read_weights
from mae_jax.port.weights import Weights
from mae_jax.storage.workdir import find_checkpoint, read_record
from mae_jax.train.step import TrainState

Message = Callable[[str], None]


def start_from(source: str, state: TrainState, config: Run, message: Message, whole: bool = False) -> TrainState:
    """Give the state before the first step the weights of `source`, wherever its arrays lie.

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
        message(f"{source}: {note}")
    if found.encoder.heads != model.encoder.heads:
        raise StatedError(
            f"init {source} has {found.encoder.heads} encoder heads, this run {model.encoder.heads}",
            field="model.encoder.heads",
        )
    if found.positions != model.positions != "learned":
        raise StatedError(
            f"init {source} has positions {found.positions}, this run {model.positions}: "
            f"continue with --model.positions {found.positions}",
            field="model.positions",
        )
    here = config.augment.mean, config.augment.std
    if not weights.normalisation_known:
        message(
            f"{source} does not say how its images were normalised; taken as this run's, mean {here[0]}, std {here[1]}"
        )
    elif (weights.mean, weights.std) != here:
        message(
            f"WARNING: images of {source} were normalised with mean {weights.mean} and std {weights.std}, "
            f"this run's with {here[0]} and {here[1]}"
        )
    given = _encoder(weights.params["encoder"], state.params["encoder"], source, message)
    if model.positions == "learned" and "pos_embed" not in given:
        message(f"the {found.positions} positions of {source} are learnt from here on")
        given |= {
            "pos_embed": fixed_positions(found.positions, found.encoder.width, model.grid, model.class_token)[None]
        }
    wrong = _differing(given, state.params["encoder"])
    if wrong:
        raise StatedError(
            f"init {source} has another encoder than this run: {wrong[0]} ({len(wrong)} differ)", field="init"
        )
    params = state.params | {"encoder": _like(given, state.params["encoder"])}
    if config.kind == "classification":
        params |= _head(weights, config, params, source, message, whole)
    else:
        params |= _decoder(weights, model, params, source, message)
    return state._replace(params=params, average=None if state.average is None else jax.tree.map(jnp.copy, params))


def adopted(config: FinetuneConfig, source: str) -> FinetuneConfig:
    """Give a configuration the encoder that `source` has, and images of its size, normalised as its were.

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
        if weights.normalisation_known:
            normalisation = weights.mean, weights.std
    positions = "learned" if config.model.positions == "learned" else found.positions
    own = {name: getattr(config.model, name) for name in ("dtype", "remat", "attention")}
    try:
        model = replace(found, positions=positions, encoder_mask_tokens=False, **own)
        augment = replace(config.augment, mean=normalisation[0], std=normalisation[1])
        return replace(config, model=model, augment=augment)
    except ValueError as error:
        raise StatedError(f"the encoder of {source} does not go with this recipe: {error}", field="init") from error


def _encoder(given: Params, wanted: Params, source: str, message: Message) -> Params:
    """Fit an encoder to this run: leave out what only the other kind of model has, add what is missing."""
    given = {name: part for name, part in given.items() if name in wanted or name not in ("norm", "mask_token")}
    if "norm" in wanted and "norm" not in given:
        message(f"{source} has no LayerNorm behind its blocks: that is new")
        given |= {"norm": wanted["norm"]}
    return given


def _decoder(weights: Weights, model: ModelConfig, params: Params, source: str, message: Message) -> Params:
    """Take the decoder of the source, and the basis of its PCA target, where this run has the same; else nothing."""
    found = encoder_config(weights.config)
    same = (found.decoder.heads, found.pca_components) == (model.decoder.heads, model.pca_components)
    if "decoder" not in weights.params:
        message(f"starting from the encoder of {source}, which has no decoder; that is new")
    elif same and not _differing(weights.params["decoder"], params["decoder"]):
        message(f"starting from the encoder and the decoder of {source}")
        carried = ("decoder",) if model.pca_components is None else ("decoder", "target")
        return {name: _like(weights.params[name], params[name]) for name in carried}
    else:
        message(f"starting from the encoder of {source}; its decoder is another one: that is new")
    return {}


def _head(
    weights: Weights, config: FinetuneConfig, params: Params, source: str, message: Message, whole: bool
) -> Params:
    """Take the head of the source where this run has the same; else nothing.

    Raises:
      StatedError: the `whole` is asked for, and there is no such head.
    """
    given, behind = weights.config, [name for name in ("fc_norm", "head") if name in params]
    same = given.kind == "classifier" and not config.sweep and given.pooling == config.pooling
    same = same and (whole or not config.batch_norm)  # what it saw is not what a new BatchNorm gives
    if same and not any(_differing(weights.params[name], params[name]) for name in behind):
        message(f"starting from the encoder and the head of {source}")
        return {name: _like(weights.params[name], params[name]) for name in behind}
    if whole:
        wanted = f"a head of {config.classes} classes on pooling {config.pooling}"
        has = "no head"
        if given.kind == "classifier":
            has = f"a head of {given.classes} classes on pooling {given.pooling} (--pooling {given.pooling})"
        raise StatedError(f"{source} has {has}, and {wanted} is to be evaluated", field="init")
    message(f"starting from the encoder of {source}; the head is new")
    return {}


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter by its path."""
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _differing(given: Params, wanted: Params) -> list[str]:
    """List the parameters that one has and the other has not, or in another shape."""
    have, want = _shapes(given), _shapes(wanted)
    return [
        f"{name} is {have.get(name, 'missing')}, not {want.get(name, 'wanted')}"
        for name in sorted(have.keys() | want.keys())
        if have.get(name) != want.get(name)
    ]


def _like(given: Params, wanted: Params) -> Params:
    """Put the given values into the dtype and the place of the wanted ones."""
    return jax.tree.map(lambda x, like: jax.device_put(np.asarray(x, like.dtype), like.sharding), given, wanted)
