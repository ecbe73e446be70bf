"""The reference's training, by plain loops over names and rows.

Pretraining: parameter groups, learning-rate curve and AdamW (He et al. 2021, Table 8). Then fine-tuning and linear
probing (appendix A.1).
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mae_jax.config import FinetuneConfig, OptimConfig
from parity.torch_mae import Classifier, MaskedAutoencoder

# --- pretraining ------------------------------------------------------------------------------------------------------


def parameter_groups(model: MaskedAutoencoder) -> dict[str, bool]:
    """List every trained parameter, and whether it decays: not those of one dimension, and no bias."""
    return {
        name: parameter.ndim > 1 and not name.endswith("bias")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def learning_rate(step: int, optim: OptimConfig, *, batch_size: int, steps_per_epoch: int, epochs: float) -> float:
    """Compute the rate of update `step`, from 0: linear warm-up, then half a cosine, or constant."""
    epoch = step / steps_per_epoch
    peak = optim.base_lr * batch_size / 256
    if epoch < optim.warmup_epochs:
        return peak * epoch / optim.warmup_epochs
    if optim.schedule == "constant":
        return peak
    angle = math.pi * (epoch - optim.warmup_epochs) / (epochs - optim.warmup_epochs)
    return optim.min_lr + (peak - optim.min_lr) / 2 * (1 + math.cos(angle))


def adamw(model: MaskedAutoencoder, optim: OptimConfig, fused: bool = False) -> torch.optim.AdamW:
    """Make AdamW over the two groups; its rate is to be set before each update."""
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
    """Return the parameters after one update at rate 1 for each set of gradients; the model stays as it is."""
    model = copy.deepcopy(model)
    optimizer = adamw(model, optim)
    for values in gradients:
        for name, parameter in model.named_parameters():
            parameter.grad = torch.from_numpy(values[name].copy()) if name in values else None
        clip([p.grad for p in model.parameters() if p.grad is not None], optim.clip_norm)
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


@dataclass
class Run:
    """A short training run: what it measured and where it ended."""

    losses: list[float]
    rates: list[float]
    final: dict[str, np.ndarray]
    average: dict[str, np.ndarray]  # exponential moving average of the parameters, where ema_decay is set


def train(model: MaskedAutoencoder, optim: OptimConfig, images: Tensor, noise: Tensor, rates: list[float]) -> Run:
    """Update the model once for each rate; images (steps, B, C, H, W) and noise (steps, B, L)."""
    optimizer, average = adamw(model, optim), as_numpy(model)
    losses = []
    for batch, batch_noise, rate in zip(images, noise, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = model(batch, batch_noise).loss
        loss.backward()
        clip([p.grad for p in model.parameters() if p.grad is not None], optim.clip_norm)
        optimizer.step()
        losses.append(loss.item())
        average = averaged(average, model, optim.ema_decay)
    return Run(losses, rates, as_numpy(model), average)


def clip(gradients: list[Tensor], largest: float | None) -> None:
    """Shorten gradients, all by the same factor, where their norm in all is larger (Pascanu et al. 2012, section 3.2).

    (PyTorch's own divides by the norm and 1e-6 more.)
    """
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    if largest is not None and norm > largest:
        for g in gradients:
            g.mul_(largest / norm)


def averaged(average: dict[str, np.ndarray], module: nn.Module, decay: float | None) -> dict[str, np.ndarray]:
    """Move an exponential average on by one step: decay times itself, and the rest of the parameters."""
    if decay is None:
        return average
    return {name: decay * average[name] + (1 - decay) * values for name, values in as_numpy(module).items()}


# --- fine-tuning and linear probing -----------------------------------------------------------------------------------


def survival(uniforms: Float[Tensor, "B depth 2"], rate: float) -> Float[Tensor, "B depth 2"]:
    """Drop paths: a branch stays with chance `keep` and is divided by it; the rate rises with the block."""
    result = torch.empty_like(uniforms)
    depth = uniforms.shape[1]
    for block in range(depth):
        keep = 1 - rate * (block / (depth - 1) if depth > 1 else 0)
        result[:, block] = (uniforms[:, block] < keep).to(uniforms.dtype) / keep
    return result


def layer_rates(model: Classifier, decay: float) -> dict[str, float]:
    """Return each parameter's share of the learning rate (Clark et al. 2020, section 3.3; Bao et al. 2021)."""
    layers = len(model.blocks) + 1
    rates = {}
    for name, _ in model.named_parameters():
        layer = layers
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        rates[name] = decay ** (layers - layer)  # the authors' param_groups_lrd
    return rates


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Float[Tensor, ""]:
    """Compute the cross entropy with targets that are shares."""
    return -(targets * functional.log_softmax(logits, dim=-1)).sum(dim=-1).mean()


def finetuning_adamw(model: Classifier, config: FinetuneConfig) -> torch.optim.AdamW:
    """Make AdamW of one group a parameter: no decay of vectors and tables, rates by layer; the rate is to be set."""
    rates, optim = layer_rates(model, config.layer_decay), config.optim
    groups = [
        {
            "params": [p],
            "weight_decay": 0.0 if p.ndim == 1 or name in ("cls_token", "pos_embed") else optim.weight_decay,
            "share": rates[name],
        }
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    return torch.optim.AdamW(groups, lr=1.0, betas=(optim.beta1, optim.beta2), eps=optim.eps)


def last_blocks(model: Classifier, count: int | None) -> set[str]:
    """Freeze all but the last blocks, what follows them, and the head; return the names of what is trained."""
    kept = (
        "head",
        "fc_norm",
        "norm",
        *(f"blocks.{n}" for n in range(len(model.blocks) - (count or 0), len(model.blocks))),
    )
    for name, p in model.named_parameters():
        if count is not None and not name.startswith(tuple(f"{part}." for part in kept)):
            p.requires_grad_(False)
    return {name for name, p in model.named_parameters() if p.requires_grad}


def finetune(
    model: Classifier, config: FinetuneConfig, batches: Sequence[tuple[Tensor, Tensor, Tensor]], rate: float
) -> Run:
    """Update what is trained once for each batch of images, targets and survival, at a constant rate."""
    optimizer, optim, losses, average = finetuning_adamw(model, config), config.optim, [], as_numpy(model)
    for images, targets, survival in batches:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        optimizer.zero_grad()
        loss = soft_cross_entropy(model(images, survival), targets)
        loss.backward()
        clip([p.grad for p in model.parameters() if p.grad is not None], optim.clip_norm)
        optimizer.step()
        losses.append(loss.item())
        average = averaged(average, model, optim.ema_decay)
    return Run(losses, [rate] * len(losses), as_numpy(model), average)


class Probe(nn.Module):
    """BatchNorm without scale and bias, then a linear head (appendix A.1)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B classes"]:
        return self.head(self.norm(features))


class Lars:
    """LARS (You et al. 2017, algorithm 1): the momentum takes in gradients that are scaled, matrix by matrix."""

    def __init__(self, module: nn.Module, momentum: float, trust: float, weight_decay: float) -> None:
        self.parameters = list(module.parameters())
        self.velocity = [torch.zeros_like(p) for p in self.parameters]
        self.momentum, self.trust, self.weight_decay = momentum, trust, weight_decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update the parameters by their gradients."""
        for p, velocity in zip(self.parameters, self.velocity, strict=True):
            assert p.grad is not None
            gradient = p.grad
            if p.ndim > 1:
                gradient = gradient + self.weight_decay * p
                lengths = p.norm().item(), gradient.norm().item()
                if min(lengths) > 0:
                    gradient = gradient * (self.trust * lengths[0] / lengths[1])
            velocity.mul_(self.momentum).add_(gradient)
            p.sub_(rate * velocity)


def as_numpy(module: nn.Module) -> dict[str, np.ndarray]:
    """Copy the parameters by name."""
    return {name: p.detach().numpy().copy() for name, p in module.named_parameters()}
