"""The two sides of a comparison: one configuration, its weights and inputs, and what each side makes of them.

`Reference` is PyTorch's side, `Ours` this project's. Both compute a thing when it is first asked for, and keep it.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jaxtyping import UInt8

from mae_jax.config import AugmentConfig, ModelConfig, OptimConfig, PretrainConfig, wide
from mae_jax.models import Params, mae
from mae_jax.port.keys import Tensors, from_fair, to_fair
from mae_jax.train import engines, objective, optimizers
from mae_jax.train import step as steps
from mae_jax.train.step import merge, select
from parity import torch_inputs, torch_mae, torch_train
from parity.bounds import Precision

STEPS = 20  # of the training run
STEPS_PER_EPOCH = 5
EPOCHS = 4.0


def run_config(model: ModelConfig, batch_size: int, seed: int) -> PretrainConfig:
    """Configure the training run: warm-up and decay of a large rate in its 20 steps; nothing at its default."""
    channels = range(model.in_channels)
    return PretrainConfig(
        model=model,
        augment=AugmentConfig(
            mean=tuple(0.48 + 0.01 * c for c in channels), std=tuple(0.28 + 0.005 * c for c in channels)
        ),
        optim=OptimConfig(
            base_lr=1e-3 * 256 / batch_size,
            min_lr=1e-5,
            warmup_epochs=1.4,
            weight_decay=0.1,
            beta1=0.8,
            beta2=0.97,
            eps=1e-6,
            ema_decay=0.8,
        ),
        batch_size=batch_size,
        epochs=EPOCHS,
        seed=seed,
    )


def of_run(run: PretrainConfig, model: ModelConfig, batch_size: int) -> PretrainConfig:
    """Configure the training run by somebody's: its optimizer, schedule and normalisation, on batches of this size."""
    base_lr = run.optim.base_lr * run.batch_size / batch_size  # so that the peak is the same
    return PretrainConfig(
        model=model,
        augment=run.augment,
        optim=replace(run.optim, base_lr=base_lr),
        batch_size=batch_size,
        epochs=EPOCHS,
        seed=run.seed,
    )


def draw_weights(model: torch.nn.Module, generator: np.random.Generator) -> Tensors:
    """Draw random weights, no tensor of which is constant: a mistake in a bias or a scale has to show.

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


@dataclass(frozen=True)
class Given:
    """What a comparison does not draw: of a run, a file or a program of somebody's own.

    weights: under the authors' names. images: uint8 (any number, height, width, channels). run: whose optimizer,
      normalisation and seed are compared. augment: the normalisation, where there is no run.
    """

    weights: Tensors | None = None
    images: UInt8[np.ndarray, "n height width channels"] | None = None
    run: PretrainConfig | None = None
    augment: AugmentConfig | None = None


class Reference:
    """The inputs, and all that PyTorch makes of them, computed once."""

    def __init__(
        self,
        config: ModelConfig,
        precision: Precision,
        seed: int = 0,
        batch_size: int = 4,
        name: str = "model",
        given: Given = Given(),
    ) -> None:
        self.name, self.precision = name, precision
        self.config = replace(config, dtype=precision, attention="xla")
        if given.run is None:
            drawn = run_config(self.config, batch_size, seed)
            self.run_config = replace(drawn, augment=given.augment or drawn.augment)
        else:
            self.run_config = of_run(given.run, self.config, batch_size)
        generator = np.random.default_rng(seed)

        self.positions = np.arange(STEPS * batch_size, dtype=np.uint32).reshape(STEPS, batch_size)
        shape = (STEPS, batch_size, *config.image_hw, config.in_channels)
        if given.images is None:
            self.bytes = generator.integers(0, 256, shape, dtype=np.uint8)
        else:
            self.bytes = given.images[np.arange(STEPS * batch_size) % len(given.images)].reshape(shape)

        self.model = torch_mae.MaskedAutoencoder(self.config).to(getattr(torch, precision))
        weights = given.weights or draw_weights(self.model, generator) | self._fitted()
        tensors = {name: torch.tensor(values, dtype=getattr(torch, precision)) for name, values in weights.items()}
        fixed = {name: p for name, p in self.model.state_dict().items() if name.endswith("pos_embed")}
        self.model.load_state_dict(fixed | tensors)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach().numpy() for name, p in (trained | dict(self.model.named_buffers())).items()}

    def _fitted(self) -> Tensors:
        """Fit a PCA target's basis to the run's own images, where there is such a target."""
        if self.config.pca_components is None:
            return {}
        patches = torch_mae.patchify(self.images.flatten(0, 1), self.config.patch_hw).flatten(0, 1)
        mean, basis = torch_mae.principal_components(patches, self.config.pca_components)
        return {"target.mean": mean.numpy(), "target.basis": basis.numpy()}

    @cached_property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the batches of all steps: normalised images (steps, B, C, H, W), and noise (steps, B, L)."""
        batches = zip(self.bytes, self.positions, strict=True)
        made = [torch_inputs.pretraining_inputs(self.run_config, images, positions) for images, positions in batches]
        images, noise = zip(*made, strict=True)
        return torch.stack(images), torch.stack(noise)

    @property
    def images(self) -> torch.Tensor:
        return self.inputs[0]

    @property
    def noise(self) -> np.ndarray:
        return self.inputs[1].numpy()

    @cached_property
    def first_pass(self) -> tuple[Tensors, Tensors]:
        """Compute every intermediate of the first batch's forward pass, and the gradient of its loss."""
        stages = self.model(self.images[0], torch.from_numpy(self.noise[0])).stages
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(stages["loss"], list(parameters.values()))
        return (
            {name: values.detach().numpy() for name, values in stages.items()},
            {name: values.numpy() for name, values in zip(parameters, gradients, strict=True)},
        )

    @property
    def stages(self) -> Tensors:
        return self.first_pass[0]

    @property
    def gradients(self) -> Tensors:
        return self.first_pass[1]

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
        """Train PyTorch's side for all steps."""
        model, noise = copy.deepcopy(self.model), torch.from_numpy(self.noise)
        return torch_train.train(model, self.run_config.optim, self.images, noise, self.rates)


# --- this project's side ----------------------------------------------------------------------------------------------


class Ours:
    """What this project makes of the same inputs and weights."""

    def __init__(self, reference: Reference, config: ModelConfig | None = None) -> None:
        self.config, self.run_config = config or reference.config, reference.run_config
        # Where blocks are computed again going backwards, nothing can be recorded of them: gradients and steps alone
        # are of that model.
        self.model = mae.MaskedAutoencoder(replace(self.config, remat=False))
        dtype = wide(self.config.dtype)
        self.params = jax.tree.map(lambda x: jnp.asarray(x, dtype), from_fair(reference.weights, self.config))
        self.bytes = reference.bytes
        self.positions = reference.positions
        self.images = jnp.asarray(reference.images[0].movedim(1, -1).numpy(), dtype)
        self.noise = jnp.asarray(reference.noise[0])

    @cached_property
    def forward(self) -> tuple[mae.Output, dict[str, jax.Array]]:
        """Run one compiled forward pass: its output, and what every module returned, as 'encoder/block_0.__call__'."""
        return jax.jit(self.recorded)(self.params, self.images, self.noise)

    def recorded(self, params: Params, images: jax.Array, noise: jax.Array) -> tuple[mae.Output, dict[str, jax.Array]]:
        """Compute the output and what every module returned.

        Blocks are no compiled functions of their own here, since out of those nothing can be recorded.
        """
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

    def gradients(self) -> Tensors:
        """Compute the gradients of the first batch's loss, under the reference's names."""
        return self.loss_and_gradients()[1]

    def loss_and_gradients(self) -> tuple[jax.Array, Tensors]:
        """Compute the first batch's loss, and its gradients under the reference's names."""
        model = mae.MaskedAutoencoder(self.config)
        compute = jax.jit(lambda *inputs: steps.loss_and_gradients(model, *inputs))
        loss, computed = compute(self.params, self.images, self.noise)
        return loss, to_fair(computed, self.config)

    def engine(self) -> engines.PmapEngine:
        """Compile the step as runs do, over two devices where there are two."""
        devices = jax.local_devices()[: math.gcd(2, self.run_config.batch_size)]
        make_step = partial(steps.make_step, self.run_config, steps_per_epoch=STEPS_PER_EPOCH, epochs=EPOCHS)
        return engines.pmap_engine(lambda axis: make_step(axis_name=axis), devices, self.run_config.batch_size, 1)

    def first_state(self, params: Params) -> steps.TrainState:
        """Make the state before the first update."""
        # A copy: the step takes its state's memory, and these weights are still needed.
        params = jax.tree.map(jnp.copy, params)
        trained = select(params, mae.trained)
        optimizer = optimizers.adamw_direction(self.run_config.optim).init(trained)
        average = jax.tree.map(jnp.copy, params) if self.run_config.optim.ema_decay is not None else None
        return steps.TrainState(jnp.zeros((), jnp.int32), params, optimizer, average)

    def drawn_noise(self) -> np.ndarray:
        """Catch the noise (B, L) that reaches the model inside the step on several devices, by position in the batch.

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
        state = engine.put_state(self.first_state({"none": jnp.zeros(())}))
        batch = engine.put_batch(objective.Batch(jnp.asarray(greys), jnp.asarray(self.positions[0])))
        with nn.intercept_methods(spy):
            jax.block_until_ready(engine.step(state, batch))
        jax.effects_barrier()
        return np.stack([drawn[example] for example in range(len(greys))])

    @cached_property
    def run(self) -> tuple[Tensors, list[steps.Metrics], Tensors, Tensors]:
        """Train this project's side: raw gradients of the first step, metrics of every step, weights and their average.

        AdamW's first moment after one update is (1 - beta1) times the gradient that the devices agreed on.
        """
        engine = self.engine()
        state, metrics, gradients = engine.put_state(self.first_state(self.params)), [], {}
        for step in range(STEPS):
            batch = objective.Batch(jnp.asarray(self.bytes[step]), jnp.asarray(self.positions[step]))
            state, measured = engine.step(state, engine.put_batch(batch))
            metrics.append(jax.device_get(measured))
            if step == 0:
                moments = optax.tree_utils.tree_get(state.optimizer, "mu")
                fixed = jax.tree.map(np.zeros_like, jax.device_get(state.params))
                moments = to_fair(merge(fixed, jax.device_get(moments)), self.config)
                gradients = {name: m / (1 - self.run_config.optim.beta1) for name, m in moments.items()}
        final, average = (
            {} if tree is None else to_fair(jax.device_get(tree), self.config) for tree in (state.params, state.average)
        )
        return gradients, metrics, final, average
