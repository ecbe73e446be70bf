"""The pretraining step: (state, batch) to (state, metrics), pure.

It knows nothing of devices but the name of the axis to average over, if there is one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt, UInt8

from mae_jax import rng
from mae_jax.config import AugmentConfig, PretrainConfig, wide
from mae_jax.models.mae import MaskedAutoencoder, Output, trained
from mae_jax.train.crops import crop_images
from mae_jax.train.optimizers import adamw_direction, learning_rate

Params = Any
Images = Float[Array, "batch height width channels"]


class Batch(NamedTuple):
    """Images as they come, and the position of each in the stream of all examples."""

    images: UInt8[Array | np.ndarray, "batch height width channels"]
    positions: UInt[Array | np.ndarray, " batch"]
    crops: Float[Array | np.ndarray, "batch 5"] | None = None  # to be cut from the images here: see train/crops.py


class TrainState(NamedTuple):
    """All that a run needs to go on: the data's place in the stream follows from `step`."""

    step: Int[Array, ""]  # updates done
    params: Params
    optimizer: optax.OptState
    average: Params | None  # exponential moving average of params, where ema_decay is set


class Metrics(NamedTuple):
    """Of one step: the batch's loss and gradient norm before the update, and the rate that the update used."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]


Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def normalise_images(
    images: UInt8[Array | np.ndarray, "batch height width channels"], augment: AugmentConfig, dtype: str
) -> Images:
    """Bytes to 0 .. 1, then by channel: (x - mean) / std."""
    mean, std = (jnp.asarray(values, dtype) for values in (augment.mean, augment.std))
    return (jnp.asarray(images, dtype) / 255 - mean) / std


def loss_and_gradients(
    model: MaskedAutoencoder, params: Params, images: Images, noise: Float[Array, "batch patches"], accumulate: int = 1
) -> tuple[Float[Array, ""], Params]:
    """The loss and its gradient, averaged over `accumulate` equal parts of the batch that run one after another.

    Every example hides as many patches as any other, so the mean of the parts' means is the mean of the batch. A part
    takes every `accumulate`-th row: where the rows are cut over devices, it has as many of each device.
    """

    def loss_of(params: Params, images: Images, noise: Float[Array, "batch patches"]) -> Float[Array, ""]:
        return cast(Output, model.apply({"params": params}, images, noise)).loss

    value_and_grad = jax.value_and_grad(loss_of)
    if accumulate == 1:
        return value_and_grad(params, images, noise)
    parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), (images, noise))
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(value_and_grad, params, *jax.tree.map(lambda x: x[0], parts)))

    def add(total: Params, part: tuple[Images, Float[Array, "batch patches"]]) -> tuple[Params, None]:
        return jax.tree.map(jnp.add, total, value_and_grad(params, *part)), None

    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / accumulate, total)


def keep_fixed(new: Params, old: Params) -> Params:
    """The new parameters, with the old values of those that are not trained."""
    return jax.tree_util.tree_map_with_path(
        lambda path, n, o: n if trained(tuple(key.key for key in path)) else o, new, old
    )


def init_state(config: PretrainConfig) -> TrainState:
    """The state before the first step; depends on the configuration and its seed alone."""
    model = config.model
    images = jnp.zeros((1, *model.image_hw, model.in_channels), wide(model.dtype))
    noise = jnp.zeros((1, model.num_patches), jnp.float32)
    # Compiled, since operation by operation every one of the forward pass would be compiled by itself.
    init = jax.jit(lambda key: MaskedAutoencoder(model).init(key, images, noise)["params"])
    params = init(rng.device_key(config.seed, "init"))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=adamw_direction(config.optim).init(params),
        average=jax.tree.map(jnp.copy, params) if config.optim.ema_decay is not None else None,
    )


def make_step(config: PretrainConfig, *, steps_per_epoch: float, epochs: float, axis_name: str | None = None) -> Step:
    """The step of a run; `steps_per_epoch` may be fractional, `epochs` is how long the learning rate's curve is."""
    model = MaskedAutoencoder(config.model)
    direction = adamw_direction(config.optim)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        pixels = batch.images
        if batch.crops is not None:
            pixels = crop_images(pixels, batch.crops, config.model.image_hw)
        images = normalise_images(pixels, config.augment, wide(config.model.dtype))
        noise = rng.example_uniforms(rng.device_key(config.seed, "mask"), batch.positions, config.model.num_patches)
        loss, grads = loss_and_gradients(model, state.params, images, noise, config.accumulate)
        if axis_name is not None:
            loss, grads = jax.lax.pmean((loss, grads), axis_name)

        epoch = state.step.astype(wide(config.model.dtype)) / steps_per_epoch
        rate = learning_rate(epoch, config.optim, batch_size=config.batch_size, epochs=epochs)
        updates, optimizer = direction.update(grads, state.optimizer, state.params)
        params = jax.tree.map(lambda p, u: p - rate.astype(p.dtype) * u, state.params, updates)
        params = keep_fixed(params, state.params)
        average = state.average
        if config.optim.ema_decay is not None:
            average = optax.incremental_update(params, average, step_size=1 - config.optim.ema_decay)
            average = keep_fixed(average, params)
        metrics = Metrics(loss=loss, grad_norm=optax.tree.norm(grads), learning_rate=rate)
        return TrainState(state.step + 1, params, optimizer, average), metrics

    return step
