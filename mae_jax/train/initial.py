"""What a run starts from: random weights, or those of another model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mae_jax.config import ModelConfig, PretrainConfig
from mae_jax.errors import StatedError
from mae_jax.port.inference import Hints
from mae_jax.port.reading import read_weights
from mae_jax.train.steps import Params, TrainState, init_state


def initial_state(config: PretrainConfig, say: Callable[[str], None]) -> TrainState:
    """The state before the first step; with `config.init`, the weights found there in place of random ones.

    A decoder that the source does not have, or has in another size, stays random; positions are fitted to the image.

    Raises:
      StatedError: there are no such weights, or their encoder is another one.
    """
    state = init_state(config)
    if config.init is None:
        return state
    model = config.model
    hints = Hints(model.encoder.heads, model.decoder.heads)
    weights = read_weights(config.init, hints, image_size=model.image_size)
    found = weights.config if isinstance(weights.config, ModelConfig) else weights.config.model
    for note in weights.notes:
        say(f"{config.init}: {note}")
    encoder = weights.params["encoder"]
    wrong = _differing(encoder, state.params["encoder"])
    if wrong:
        raise StatedError(f"init {config.init} has another encoder than this run: {wrong[0]} ({len(wrong)} differ)")
    params = state.params | {"encoder": _like(encoder, state.params["encoder"])}
    if "decoder" in weights.params and not _differing(weights.params["decoder"], state.params["decoder"]):
        params |= {"decoder": _like(weights.params["decoder"], state.params["decoder"])}
        say(f"starting from the encoder and the decoder of {config.init}")
    else:
        say(f"starting from the encoder of {config.init}; the decoder is new")
    if found.positions != model.positions:
        raise StatedError(
            f"init {config.init} has positions {found.positions}, this run {model.positions}: "
            f"continue with --model.positions {found.positions}"
        )
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
    return jax.tree.map(lambda values, like: jnp.asarray(values, like.dtype), given, wanted)
