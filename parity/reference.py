"""The reference's side of a comparison: one configuration, its weights and inputs, and what PyTorch makes of them."""

import copy
from dataclasses import replace
from functools import cached_property

import jax
import numpy as np
import torch

from mae_jax import rng
from mae_jax.config import AugmentConfig, ModelConfig, OptimConfig, PretrainConfig
from mae_jax.port.keys import Tensors
from parity import torch_mae, torch_train
from parity.tolerances import Precision

STEPS = 20  # of the training run
STEPS_PER_EPOCH = 5
EPOCHS = 4.0


def run_config(model: ModelConfig, batch_size: int, seed: int) -> PretrainConfig:
    """The training run: a large rate, a warm-up and a decay within its 20 steps."""
    channels = range(model.in_channels)
    return PretrainConfig(
        model=model,
        augment=AugmentConfig(
            mean=tuple(0.48 + 0.01 * c for c in channels), std=tuple(0.28 + 0.005 * c for c in channels)
        ),
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
        weights = draw_weights(self.model, generator) | self._fitted()
        self.model.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()})
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach().numpy() for name, p in (trained | dict(self.model.named_buffers())).items()}

    def _fitted(self) -> Tensors:
        """A PCA target's basis of the run's own images, where there is such a target."""
        if self.config.pca_components is None:
            return {}
        patches = torch_mae.patchify(self.images.flatten(0, 1), self.config.patch_hw).flatten(0, 1)
        mean, basis = torch_mae.principal_components(patches, self.config.pca_components)
        return {"target.mean": mean.numpy(), "target.basis": basis.numpy()}

    def _noise(self) -> np.ndarray:
        """The noise of every step (steps, B, L), each example's row drawn alone."""
        key = rng.device_key(self.run_config.seed, "mask")
        draw = jax.jit(lambda position: rng.example_uniforms(key, position[None], self.config.num_patches)[0])
        return np.stack([[draw(position) for position in row] for row in self.positions])

    @cached_property
    def images(self) -> torch.Tensor:
        """Normalised images of all steps: (steps, B, C, H, W)."""
        augment, dtype = self.run_config.augment, getattr(torch, self.precision)
        mean, std = (torch.tensor(values, dtype=dtype) for values in (augment.mean, augment.std))
        return ((torch.from_numpy(self.bytes).to(dtype) / 255 - mean) / std).movedim(-1, 2)

    @cached_property
    def first_pass(self) -> tuple[Tensors, Tensors]:
        """Every intermediate of the first batch's forward pass, and the gradient of its loss."""
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
        """The training run."""
        model, noise = copy.deepcopy(self.model), torch.from_numpy(self.noise)
        return torch_train.train(model, self.run_config.optim, self.images, noise, self.rates)
