"""AdamW and LARS with the authors' parameter groups, and the learning-rate curve (He et al. 2021, Tables 8 to 10)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from mae_jax.config import OptimConfig

# The batch that base_lr is meant for (Goyal et al. 2017, linear scaling).
REFERENCE_BATCH = 256

DecayMask = Callable[[Any], Any]  # parameters to whether each decays

# A weight this large comes of a rate that is far too large; a step later it could be infinite.
_DIVERGED = 1e15

# Trained parameters that are no kernels, though they have more than one dimension.
_TABLES = ("cls_token", "mask_token", "pos_embed")


def peak_learning_rate(optim: OptimConfig, batch_size: int) -> float:
    """Scale base_lr linearly by the global batch."""
    return optim.base_lr * batch_size / REFERENCE_BATCH


def learning_rate(
    epoch: Float[Array, "*any"], optim: OptimConfig, *, batch_size: int, epochs: float
) -> Float[Array, "*any"]:
    """Compute the rate at fractional epochs: a linear warm-up from 0, then constant, or half a cosine to min_lr."""
    # By the epoch, not by the step, so that the curve does not depend on how many steps an epoch has.
    peak = peak_learning_rate(optim, batch_size)
    if optim.schedule == "constant":
        after_warmup: float | Array = peak
    else:
        progress = (epoch - optim.warmup_epochs) / max(epochs - optim.warmup_epochs, 1e-9)
        after_warmup = optim.min_lr + (peak - optim.min_lr) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    if optim.warmup_epochs == 0:
        return jnp.broadcast_to(jnp.asarray(after_warmup, epoch.dtype), epoch.shape)
    return jnp.where(epoch < optim.warmup_epochs, peak * epoch / optim.warmup_epochs, after_warmup)


def decay_mask(params: Any) -> Any:
    """Mark where weight decay applies: on kernels, tokens and learned positions, not on biases and LayerNorm."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def kernel_mask(params: Any) -> Any:
    """Mark where weight decay applies in fine-tuning: on kernels alone, as the authors' code has it."""
    return jax.tree_util.tree_map_with_path(lambda path, p: p.ndim > 1 and path[-1].key not in _TABLES, params)


def direction(optim: OptimConfig, mask: DecayMask | None = None) -> optax.GradientTransformation:
    """Make the configured optimizer before the learning rate: the step subtracts rate times its result.

    mask: what AdamW's decay applies to, by default `decay_mask`.
    """
    return adamw_direction(optim, mask) if optim.optimizer == "adamw" else lars_direction(optim)


def _clip(optim: OptimConfig) -> optax.GradientTransformation:
    """Make the clipping of the global gradient norm, if it is on."""
    return optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm is not None else optax.identity()


def adamw_direction(optim: OptimConfig, mask: DecayMask | None = None) -> optax.GradientTransformation:
    """Make AdamW (Loshchilov and Hutter 2019); eps stands outside the root, the decay is multiplied by the rate."""
    return optax.chain(
        _clip(optim),
        optax.scale_by_adam(b1=optim.beta1, b2=optim.beta2, eps=optim.eps),
        optax.add_decayed_weights(optim.weight_decay, mask=mask or decay_mask),
    )


class LarsState(NamedTuple):
    """The running sum of scaled gradients."""

    velocity: optax.Updates


def lars_direction(optim: OptimConfig) -> optax.GradientTransformation:
    """Make LARS (You et al. 2017) of optax's parts, as the authors probe with it (appendix A.1; MoCo v3).

    A kernel's gradient, its decay added, is made `trust` times as long as the kernel; then momentum. Biases and
    LayerNorms are neither scaled nor decayed. `optax.lars` applies the rate before the momentum, which differs while
    the rate changes.
    """
    # In this order: decay is part of the gradient whose length is measured. Only kernels are decayed and scaled.
    scale = optax.chain(
        optax.add_decayed_weights(optim.weight_decay, mask=decay_mask),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=optim.trust), decay_mask),
    )
    momentum = optax.trace(optim.momentum)

    # Scaling has no state of its own. The momentum's goes by the name that checkpoints have for it.
    def init(params: optax.Params) -> LarsState:
        return LarsState(momentum.init(params).trace)

    def update(
        gradients: optax.Updates, state: LarsState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, LarsState]:
        assert params is not None
        scaled, _ = scale.update(gradients, scale.init(params), params)
        updates, after = momentum.update(scaled, optax.TraceState(state.velocity), params)
        return updates, LarsState(after.trace)

    return optax.chain(_clip(optim), optax.GradientTransformation(init, update))


def not_diverged(params: Any) -> Bool[Array, " heads"]:
    """Mark which of several models, stacked along every parameter's first axis, have not diverged."""
    sound = [(jnp.abs(p) < _DIVERGED).reshape(len(p), -1).all(axis=1) for p in jax.tree.leaves(params)]
    return jnp.stack(sound).all(axis=0)


def per_head(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """Make an optimizer of several models at once; one that has diverged stays as it is, and the others go on."""

    def update(gradients: optax.Updates, state: optax.OptState, params: optax.Params | None = None) -> Any:
        # vmap over the first axis of everything: norms and trust ratios are then each head's own.
        updates, state = jax.vmap(transformation.update)(gradients, state, params)
        return zero_where_diverged(updates, not_diverged(params)), state

    return optax.GradientTransformation(jax.vmap(transformation.init), update)


def zero_where_diverged(tree: Any, sound: Bool[Array, " heads"]) -> Any:
    """Replace what belongs to a model that has diverged by zeros."""
    return jax.tree.map(lambda x: jnp.where(sound.reshape(-1, *[1] * (x.ndim - 1)), x, 0), tree)


def layer_rates(params: Any, depth: int, decay: float) -> Any:
    """Compute layer decay: what each parameter's learning rate is multiplied by in fine-tuning.

    1 behind the blocks; `decay` for the last block, decay^2 for the one before ...; decay^(depth + 1) in front.
    Source: Clark et al. 2020, section 3.3; Bao et al. 2021.
    """

    def power(path: tuple[Any, ...]) -> int:
        """Return the exponent of a parameter's layer."""
        names = [key.key for key in path]
        if names[0] != "encoder" or names[1] == "norm":
            return 0
        # Projection, class token and positions count as one layer in front of block 0.
        number = int(names[1].removeprefix("block_")) if names[1].startswith("block_") else -1
        return depth - number

    return jax.tree_util.tree_map_with_path(lambda path, p: decay ** power(path), params)
