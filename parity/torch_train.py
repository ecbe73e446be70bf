"""The reference's training: parameter groups, learning-rate curve and AdamW (He et al. 2021, Table 8)."""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mae_jax.config import OptimConfig
from parity.torch_mae import MaskedAutoencoder


def parameter_groups(model: MaskedAutoencoder) -> dict[str, bool]:
    """Every trained parameter, and whether it decays: not those of one dimension, and no bias."""
    return {
        name: parameter.ndim > 1 and not name.endswith("bias")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def learning_rate(step: int, optim: OptimConfig, *, batch_size: int, steps_per_epoch: int, epochs: float) -> float:
    """The rate of update `step`, counted from 0: linear warm-up, then half a cosine, in fractional epochs."""
    epoch = step / steps_per_epoch
    peak = optim.base_lr * batch_size / 256
    if epoch < optim.warmup_epochs:
        return peak * epoch / optim.warmup_epochs
    angle = math.pi * (epoch - optim.warmup_epochs) / (epochs - optim.warmup_epochs)
    return optim.min_lr + (peak - optim.min_lr) / 2 * (1 + math.cos(angle))


def adamw(model: MaskedAutoencoder, optim: OptimConfig, fused: bool = False) -> torch.optim.AdamW:
    """AdamW over the two groups; its rate is to be set before each update."""
    decays = parameter_groups(model)
    parameters = dict(model.named_parameters())
    groups = [
        {
            "params": [parameters[name] for name, does in decays.items() if does == decay],
            "weight_decay": optim.weight_decay if decay else 0.0,
        }
        for decay in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=1.0, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=fused)


def updated(
    model: MaskedAutoencoder, optim: OptimConfig, gradients: list[dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The parameters after one update at rate 1 for each set of gradients; the model stays as it is."""
    model = copy.deepcopy(model)
    optimizer = adamw(model, optim)
    for values in gradients:
        for name, parameter in model.named_parameters():
            parameter.grad = torch.from_numpy(values[name]) if name in values else None
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


@dataclass
class Run:
    """A short training run: what it measured and where it ended."""

    losses: list[float]
    rates: list[float]
    final: dict[str, np.ndarray]


def train(model: MaskedAutoencoder, optim: OptimConfig, images: Tensor, noise: Tensor, rates: list[float]) -> Run:
    """One update for each rate; images (steps, B, C, H, W) and noise (steps, B, L). Changes the model."""
    optimizer = adamw(model, optim)
    losses = []
    for batch, batch_noise, rate in zip(images, noise, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = model(batch, batch_noise).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Run(losses, rates, {name: p.detach().numpy() for name, p in model.named_parameters()})
