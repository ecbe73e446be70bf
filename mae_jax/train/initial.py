"""Weights of another model to start from."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.config import ModelConfig
from mae_jax.errors import StatedError
from mae_jax.port.inference import Hints
from mae_jax.port.reading import read_weights
from mae_jax.train.steps import Params, TrainState


def start_from(source: str, state: TrainState, model: ModelConfig, say: Callable[[str], None]) -> TrainState:
    """The state before the first step with the weights of `source`, wherever its arrays lie.

    A decoder that the source does not have, or has in another size or for another target, stays random; positions are
    fitted to the image. With a decoder of principal coefficients comes the basis that they are in.

    Raises:
      StatedError: there are no such weights, or their encoder is another one.
    """
    known = Hints(model.encoder.heads, model.decoder.heads)
    weights = read_weights(source, fallback=known, image_size=model.image_size)
    found = weights.config if isinstance(weights.config, ModelConfig) else weights.config.model
    for note in weights.notes:
        say(f"{source}: {note}")
    if found.encoder.heads != model.encoder.heads:
        raise StatedError(f"init {source} has {found.encoder.heads} encoder heads, this run {model.encoder.heads}")
    if found.positions != model.positions:
        raise StatedError(
            f"init {source} has positions {found.positions}, this run {model.positions}: "
            f"continue with --model.positions {found.positions}"
        )
    wrong = _differing(weights.params["encoder"], state.params["encoder"])
    if wrong:
        raise StatedError(f"init {source} has another encoder than this run: {wrong[0]} ({len(wrong)} differ)")
    params = state.params | {"encoder": _like(weights.params["encoder"], state.params["encoder"])}
    same = (found.decoder.heads, found.pca_components) == (model.decoder.heads, model.pca_components)
    if "decoder" not in weights.params:
        say(f"starting from the encoder of {source}, which has no decoder; that is new")
    elif same and not _differing(weights.params["decoder"], state.params["decoder"]):
        carried = ("decoder",) if model.pca_components is None else ("decoder", "target")
        params |= {name: _like(weights.params[name], state.params[name]) for name in carried}
        say(f"starting from the encoder and the decoder of {source}")
    else:
        say(f"starting from the encoder of {source}; its decoder is another one: that is new")
    return state._replace(params=params, average=None if state.average is None else jax.tree.map(jnp.copy, params))


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
