"""What is compared with what: one configuration, its weights and inputs, the reference's side and this project's."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from mae_jax import rng
from mae_jax.config import AugmentConfig, ModelConfig, OptimConfig, PretrainConfig
from mae_jax.models import mae
from mae_jax.port.keys import Params, Tensors, from_fair, to_fair
from mae_jax.train import engines, optimizers, steps
from parity import torch_mae, torch_train
from parity.tolerances import Precision

STEPS = 20  # of the training run
STEPS_PER_EPOCH = 5
EPOCHS = 4.0


def run_config(model: ModelConfig, batch_size: int, seed: int) -> PretrainConfig:
    """The training run: a large rate, a warm-up and a decay within its 20 steps."""
    grey = (0.5,) * model.in_channels
    return PretrainConfig(
        model=model,
        augment=AugmentConfig(mean=grey, std=(0.25,) * model.in_channels),
        optim=OptimConfig(base_lr=1e-3 * 256 / batch_size, min_lr=1e-5, warmup_epochs=1.4),
        batch_size=batch_size,
        epochs=EPOCHS,
        seed=seed,
    )


def draw_weights(model: torch_mae.MaskedAutoencoder, generator: np.random.Generator) -> Tensors:
    """Random weights, no tensor of which is constant: a mistake in a bias or a scale has to show.

    Kernels are xavier uniform; LayerNorm scales lie about 1; biases, tokens and learned positions about 0.
    """
    weights = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if not parameter.requires_grad:
            weights[name] = parameter.numpy()
        elif "token" in name or "pos_embed" in name or len(shape) == 1:
            weights[name] = 0.1 * generator.standard_normal(shape) + ("norm" in name and name.endswith("weight"))
        else:
            limit = (6 / (shape[0] + np.prod(shape[1:]))) ** 0.5
            weights[name] = generator.uniform(-limit, limit, shape)
    return weights


class Reference:
    """The inputs, and all that PyTorch makes of them, computed once."""

    def __init__(self, config: ModelConfig, precision: Precision, seed: int = 0, batch_size: int = 4) -> None:
        self.config = replace(config, dtype=precision, remat=False)
        self.precision = precision
        self.run_config = run_config(self.config, batch_size, seed)
        generator = np.random.default_rng(seed)

        self.positions = np.arange(STEPS * batch_size, dtype=np.uint32).reshape(STEPS, batch_size)
        shape = (STEPS, batch_size, *config.image_hw, config.in_channels)
        self.bytes = generator.integers(0, 256, shape, dtype=np.uint8)
        self.noise = self._noise()

        self.model = torch_mae.MaskedAutoencoder(self.config).to(getattr(torch, precision))
        self.weights = {name: values.astype(precision) for name, values in draw_weights(self.model, generator).items()}
        self.model.load_state_dict({name: torch.from_numpy(values) for name, values in self.weights.items()})

    def _noise(self) -> np.ndarray:
        """The noise of every step (steps, B, L), each example's row drawn alone."""
        key = rng.device_key(self.run_config.seed, "mask")
        draw = jax.jit(lambda position: rng.example_uniforms(key, position[None], self.config.num_patches)[0])
        return np.stack([[draw(position) for position in row] for row in self.positions])

    @cached_property
    def images(self) -> torch.Tensor:
        """Normalised images of all steps: (steps, B, C, H, W)."""
        pixels = torch.from_numpy(self.bytes).to(getattr(torch, self.precision)).movedim(-1, 2)
        return (pixels / 255 - 0.5) / 0.25

    @cached_property
    def output(self) -> torch_mae.Output:
        return self.model(self.images[0], torch.from_numpy(self.noise[0]))

    @cached_property
    def stages(self) -> Tensors:
        """Every intermediate of the first batch's forward pass."""
        return {name: values.detach().numpy() for name, values in self.output.stages.items()}

    @cached_property
    def gradients(self) -> Tensors:
        """Of the first batch's loss."""
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        values = torch.autograd.grad(self.output.loss, list(parameters.values()), retain_graph=True)
        return {name: value.numpy() for name, value in zip(parameters, values, strict=True)}

    @cached_property
    def rates(self) -> list[float]:
        config = self.run_config
        return [
            torch_train.learning_rate(
                step, config.optim, batch_size=config.batch_size, steps_per_epoch=STEPS_PER_EPOCH, epochs=EPOCHS
            )
            for step in range(STEPS)
        ]

    @cached_property
    def run(self) -> torch_train.Run:
        """The training run."""
        model, noise = copy.deepcopy(self.model), torch.from_numpy(self.noise)
        return torch_train.train(model, self.run_config.optim, self.images, noise, self.rates)


class Ours:
    """What this project makes of the same inputs and weights."""

    def __init__(self, reference: Reference) -> None:
        self.config, self.run_config = reference.config, reference.run_config
        self.model = mae.MaskedAutoencoder(self.config)
        self.params = jax.tree.map(jnp.asarray, from_fair(reference.weights, self.config))
        self.bytes = reference.bytes
        self.positions = reference.positions
        self.noise = jnp.asarray(reference.noise[0])

    @cached_property
    def images(self) -> jax.Array:
        """The first batch, normalised."""
        return steps.normalise_images(jnp.asarray(self.bytes[0]), self.run_config.augment, self.config.dtype)

    @cached_property
    def forward(self) -> tuple[mae.Output, dict[str, jax.Array]]:
        """One compiled forward pass: its output, and what every module returned, as 'encoder/block_0.__call__'."""

        def recorded(params: Any, images: jax.Array, noise: jax.Array) -> tuple[mae.Output, dict[str, jax.Array]]:
            returned = {}

            def record(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
                values = call(*args, **kwargs)
                if isinstance(values, jax.Array):
                    returned["/".join(context.module.path) + "." + context.method_name] = values
                return values

            with nn.intercept_methods(record):
                output = self.model.apply({"params": params}, images, noise)
            assert isinstance(output, mae.Output)
            return output, returned

        return jax.jit(recorded)(self.params, self.images, self.noise)

    @cached_property
    def gradients(self) -> Tensors:
        """Of the first batch's loss, under the reference's names."""

        def gradients(params: Any, images: jax.Array, noise: jax.Array) -> Any:
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
        optimizer = optimizers.adamw_direction(self.run_config.optim).init(params)
        return steps.TrainState(jnp.zeros((), jnp.int32), params, optimizer, average=None)

    @cached_property
    def run(self) -> tuple[Tensors, list[steps.Metrics], Tensors]:
        """The training run: raw gradients of its first step, metrics of every step, final weights.

        AdamW's first moment after one update is (1 - beta1) times the gradient that the devices agreed on.
        """
        engine = self.engine()
        state, metrics, gradients = engine.place(self.first_state(self.params)), [], {}
        for step in range(STEPS):
            state, measured = engine.step(
                state, engine.put(steps.Batch(jnp.asarray(self.bytes[step]), jnp.asarray(self.positions[step])))
            )
            metrics.append(jax.device_get(measured))
            if step == 0:
                moments = optax.tree_utils.tree_get(state.optimizer, "mu")
                moments = to_fair(jax.device_get(moments), self.config)
                gradients = {name: m / (1 - self.run_config.optim.beta1) for name, m in moments.items()}
        return gradients, metrics, to_fair(jax.device_get(state.params), self.config)
