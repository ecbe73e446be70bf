"""The training step: (state, batch) to (state, metrics), pure, whatever the objective.

It knows nothing of devices but the name of the axis to average over, if there is one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mae_jax.config import Run, wide
from mae_jax.models import Params
from mae_jax.models.mae import MaskedAutoencoder
from mae_jax.models.masking import Noise
from mae_jax.models.patches import Images
from mae_jax.train.objective import Batch, Objective, Pretraining, reconstruction_loss
from mae_jax.train.optimizers import learning_rate


def select(params: Params, wanted: Callable[[tuple[str, ...]], bool], path: tuple[str, ...] = ()) -> Params:
    """Keep the leaves of a nested dictionary whose path is wanted; branches without any are left out."""
    found: Params = {}
    for name, value in params.items():
        here = (*path, name)
        if isinstance(value, dict):
            if branch := select(value, wanted, here):
                found[name] = branch
        elif wanted(here):
            found[name] = value
    return found


def merge(params: Params, part: Params) -> Params:
    """Put the leaves of `part` in place of those of `params`."""
    return {
        name: merge(value, part[name]) if isinstance(value, dict) and name in part else part.get(name, value)
        for name, value in params.items()
    }


def mean_of_parts(function: Callable[[Any], Any], inputs: Any, count: int, group_size: int = 1) -> Any:
    """Average what `function` makes of `count` equal parts of the inputs, one after another.

    A part takes every `count`-th group of `group_size` neighbouring rows.
    """
    if count == 1:
        return function(inputs)

    # Rows a, b, c, d ... in two parts are a, c ... and b, d ..., not the first half and the second: where rows lie cut
    # over devices, each device then has as many of every part, and none has to be sent to another.
    def cut(x: jax.Array) -> jax.Array:
        groups = x.reshape(-1, count, group_size, *x.shape[1:])
        return groups.swapaxes(0, 1).reshape(count, -1, *x.shape[1:])

    # One part after another, so that the activations of one alone are in memory.
    parts = jax.tree.map(cut, inputs)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts)))
    total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, function(part)), None), zeros, parts)
    return jax.tree.map(lambda x: x / count, total)


class TrainState(NamedTuple):
    """All that a run needs to continue: the data's place in the stream follows from `step`."""

    step: Int[Array, ""]  # updates done
    params: Params
    optimizer: optax.OptState  # of the trained parameters
    average: Params | None  # exponential moving average of params, where ema_decay is set


class Metrics(NamedTuple):
    """Of one step: the batch's loss and gradient norm before the update, and the rate that the update used."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]


Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_objective(config: Run, axis_name: str | None = None) -> Objective:
    """Make the objective that a run of this configuration minimises."""
    if config.kind == "pretraining":
        return Pretraining(config)
    from mae_jax.train.classification import Classification  # noqa: PLC0415 - pretraining does without

    return Classification(config, axis_name)


def init_state(config: Run) -> TrainState:
    """Make the state before the first step, from the configuration and its seed alone."""
    objective = make_objective(config)
    params = objective.init()
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=objective.direction(config.optim).init(select(params, objective.trained)),
        average=jax.tree.map(jnp.copy, params) if config.optim.ema_decay is not None else None,
    )


def make_step(config: Run, *, steps_per_epoch: float, epochs: float, axis_name: str | None = None) -> Step:
    """Make the step of a run.

    steps_per_epoch: may be fractional. epochs: how long the learning rate's curve is. axis_name: of the devices whose
      losses and gradients are averaged, where the step is one device's.
    """
    objective = make_objective(config, axis_name)
    optimizer = objective.direction(config.optim)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # Gradients are taken of the trained parameters alone; frozen ones have none, and no place in the optimizer.
        trainable = select(state.params, objective.trained)

        def loss_of(trainable: Params, inputs: Any) -> tuple[Float[Array, ""], Params]:
            return objective.loss(merge(state.params, trainable), inputs)

        def gradient_of(part: Batch) -> Any:
            pixels = part.images
            if part.crops is not None:
                from mae_jax.train.crops import crop_images  # noqa: PLC0415 - few runs cut crops on the device

                pixels = crop_images(pixels, part.crops, config.model.image_hw)
            # Bytes become numbers part by part: the whole batch would take four times its memory.
            inputs = objective.inputs(part, jnp.asarray(pixels), state.step)
            return jax.value_and_grad(loss_of, has_aux=True)(trainable, inputs)

        # Loss and gradient, averaged over the parts of the batch and then over the devices.
        arrays = jax.tree.map(jnp.asarray, batch)
        (loss, replaced), grads = mean_of_parts(gradient_of, arrays, config.accumulate, objective.group_size)
        if axis_name is not None:
            loss, grads = jax.lax.pmean((loss, grads), axis_name)

        # The update of the trained parameters; what the loss replaced goes into the others.
        epoch = state.step.astype(wide(config.model.dtype)) / steps_per_epoch
        rate = learning_rate(epoch, config.optim, batch_size=config.batch_size, epochs=epochs)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, trainable)
        if (rates := objective.rates(trainable)) is not None:
            updates = jax.tree.map(jnp.multiply, updates, rates)
        trainable = jax.tree.map(lambda p, u: p - rate.astype(p.dtype) * u, trainable, updates)
        params = merge(state.params, trainable) | replaced

        # The running average follows the trained parameters; the others are as they are.
        average = state.average
        if config.optim.ema_decay is not None:
            averaged = optax.incremental_update(params, average, step_size=1 - config.optim.ema_decay)
            average = merge(params, select(averaged, objective.trained))
        metrics = Metrics(loss=loss, grad_norm=optax.tree.norm(grads), learning_rate=rate)
        return TrainState(state.step + 1, params, optimizer_state, average), metrics

    return step


def loss_and_gradients(
    model: MaskedAutoencoder, params: Params, images: Images, noise: Noise, accumulate: int = 1
) -> tuple[Float[Array, ""], Params]:
    """Compute a masked autoencoder's loss and its gradient, averaged over `accumulate` equal parts of the batch.

    Every example hides as many patches as any other, so the mean of the parts' means is the mean of the batch.
    """
    gradient = jax.value_and_grad(reconstruction_loss, argnums=1)
    return mean_of_parts(lambda part: gradient(model, params, *part), (images, noise), accumulate)
