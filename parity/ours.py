"""This project's side of a comparison: what mae_jax makes of the reference's inputs and weights."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mae_jax.models import Params, mae
from mae_jax.port.keys import Tensors, from_fair, to_fair
from mae_jax.train import engines, objective, optimizers
from mae_jax.train import step as steps
from mae_jax.train.step import merge, select
from parity.reference import EPOCHS, STEPS, STEPS_PER_EPOCH, Reference


class Ours:
    """What this project makes of the same inputs and weights."""

    def __init__(self, reference: Reference) -> None:
        self.config, self.run_config = reference.config, reference.run_config
        self.model = mae.MaskedAutoencoder(self.config)
        self.params = jax.tree.map(jnp.asarray, from_fair(reference.weights, self.config))
        self.bytes = reference.bytes
        self.positions = reference.positions
        self.images = jnp.asarray(reference.images[0].movedim(1, -1).numpy())
        self.noise = jnp.asarray(reference.noise[0])

    @cached_property
    def forward(self) -> tuple[mae.Output, dict[str, jax.Array]]:
        """One compiled forward pass: its output, and what every module returned, as 'encoder/block_0.__call__'.

        Its blocks are no compiled functions of their own, since out of those nothing can be recorded.
        """

        def recorded(params: Any, images: jax.Array, noise: jax.Array) -> tuple[mae.Output, dict[str, jax.Array]]:
            returned = {}

            def record(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
                values = call(*args, **kwargs)
                if isinstance(values, jax.Array) and context.method_name in ("__call__", "embed"):
                    returned["/".join(context.module.path) + "." + context.method_name] = values
                return values

            with jax.disable_jit(), nn.intercept_methods(record):
                output = self.model.apply({"params": params}, images, noise)
            assert isinstance(output, mae.Output)
            return output, returned

        return jax.jit(recorded)(self.params, self.images, self.noise)

    def gradients(self) -> Tensors:
        """Of the first batch's loss, under the reference's names."""

        def gradients(params: Params, images: jax.Array, noise: jax.Array) -> Params:
            return steps.loss_and_gradients(self.model, params, images, noise)[1]

        return to_fair(jax.jit(gradients)(self.params, self.images, self.noise), self.config)

    def engine(self) -> engines.PmapEngine:
        """The step as it is run, over two devices where there are two."""
        devices = jax.local_devices()[:2]
        make_step = partial(steps.make_step, self.run_config, steps_per_epoch=STEPS_PER_EPOCH, epochs=EPOCHS)
        return engines.pmap_engine(lambda axis: make_step(axis_name=axis), devices, self.run_config.batch_size, 1)

    def first_state(self, params: Params) -> steps.TrainState:
        """The state before the first update."""
        # A copy: the step takes its state's memory, and these weights are still needed.
        params = jax.tree.map(jnp.copy, params)
        trained = select(params, mae.trained)
        optimizer = optimizers.adamw_direction(self.run_config.optim).init(trained)
        return steps.TrainState(jnp.zeros((), jnp.int32), params, optimizer, average=None)

    def drawn_noise(self) -> np.ndarray:
        """The noise (B, L) that reaches the model inside the step on several devices, by position in the batch.

        The model is not run: it hands its inputs to the host. An example is known by its image, all of one grey level.
        """
        mean, std = self.run_config.augment.mean[0], self.run_config.augment.std[0]
        drawn: dict[int, np.ndarray] = {}

        def keep(pixels: np.ndarray, rows: np.ndarray) -> None:
            drawn.update(zip(np.rint((pixels * std + mean) * 255).astype(int).tolist(), rows, strict=True))

        def spy(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            if type(context.module) is not mae.MaskedAutoencoder or context.method_name != "__call__":
                return call(*args, **kwargs)
            images, rows = args
            jax.debug.callback(keep, images[:, 0, 0, 0], rows)
            unused = images.reshape(*rows.shape, -1)
            return mae.Output(jnp.zeros((), images.dtype), unused, unused, rows, rows, unused)

        greys = np.broadcast_to(np.arange(len(self.bytes[0]), dtype=np.uint8)[:, None, None, None], self.bytes[0].shape)
        engine = self.engine()
        state = engine.place(self.first_state({"none": jnp.zeros(())}))
        batch = engine.put(objective.Batch(jnp.asarray(greys), jnp.asarray(self.positions[0])))
        with nn.intercept_methods(spy):
            jax.block_until_ready(engine.step(state, batch))
        jax.effects_barrier()
        return np.stack([drawn[example] for example in range(len(greys))])

    @cached_property
    def run(self) -> tuple[Tensors, list[steps.Metrics], Tensors]:
        """The training run: raw gradients of its first step, metrics of every step, final weights.

        AdamW's first moment after one update is (1 - beta1) times the gradient that the devices agreed on.
        """
        engine = self.engine()
        state, metrics, gradients = engine.place(self.first_state(self.params)), [], {}
        for step in range(STEPS):
            batch = objective.Batch(jnp.asarray(self.bytes[step]), jnp.asarray(self.positions[step]))
            state, measured = engine.step(state, engine.put(batch))
            metrics.append(jax.device_get(measured))
            if step == 0:
                moments = optax.tree_utils.tree_get(state.optimizer, "mu")
                fixed = jax.tree.map(np.zeros_like, jax.device_get(state.params))
                moments = to_fair(merge(fixed, jax.device_get(moments)), self.config)
                gradients = {name: m / (1 - self.run_config.optim.beta1) for name, m in moments.items()}
        return gradients, metrics, to_fair(jax.device_get(state.params), self.config)
