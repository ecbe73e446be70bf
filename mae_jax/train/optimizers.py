"""AdamW with the authors' parameter groups, and the learning-rate curve (He et al. 2021, Table 8)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mae_jax.config import OptimConfig

# The batch that base_lr is meant for (Goyal et al. 2017, linear scaling).
REFERENCE_BATCH = 256


def peak_learning_rate(optim: OptimConfig, batch_size: int) -> float:
    """base_lr scaled linearly by the global batch."""
    return optim.base_lr * batch_size / REFERENCE_BATCH


def learning_rate(
    epoch: Float[Array, "*any"], optim: OptimConfig, *, batch_size: int, epochs: float
) -> Float[Array, "*any"]:
    """The rate at fractional epochs: a straight warm-up from 0, then half a cosine down to min_lr, or constant."""
    peak = peak_learning_rate(optim, batch_size)
    if optim.schedule == "constant":
        settled: float | Array = peak
    else:
        progress = (epoch - optim.warmup_epochs) / max(epochs - optim.warmup_epochs, 1e-9)
        settled = optim.min_lr + (peak - optim.min_lr) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    if optim.warmup_epochs == 0:
        return jnp.asarray(settled, epoch.dtype)
    return jnp.where(epoch < optim.warmup_epochs, peak * epoch / optim.warmup_epochs, settled)


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: on kernels, tokens and learned positions, not on biases and LayerNorm."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def adamw_direction(optim: OptimConfig) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019) before the learning rate: its update is -rate times this.

    eps stands outside the root; the decoupled decay is multiplied by the rate, as everything here.
    """
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm is not None else optax.identity(),
        optax.scale_by_adam(b1=optim.beta1, b2=optim.beta2, eps=optim.eps),
        optax.add_decayed_weights(optim.weight_decay, mask=decay_mask),
    )
