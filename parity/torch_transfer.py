"""The reference's fine-tuning and linear probing (He et al. 2021, appendix A.1), by plain loops over names and rows."""

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from mae_jax.config import FinetuneConfig
from parity.torch_mae import Classifier


def smoothed(
    labels: Int[Tensor, "B"], classes: int, smoothing: float, dtype: torch.dtype
) -> Float[Tensor, "B classes"]:
    """The targets whose cross entropy is PyTorch's own with `label_smoothing` (Szegedy et al. 2015, section 7)."""
    targets = torch.full((len(labels), classes), smoothing / classes, dtype=dtype)
    for row, label in zip(targets, labels.tolist(), strict=True):
        row[label] += 1 - smoothing
    return targets


def partner(row: int) -> int:
    """With whom an example is mixed: its neighbour."""
    return row + 1 if row % 2 == 0 else row - 1


def mixup(images: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Zhang et al. 2017, equation 1, row by row."""
    order = [partner(row) for row in range(len(images))]
    return images * share + images[order] * (1 - share), targets * share + targets[order] * (1 - share)


def cutmix(images: Tensor, targets: Tensor, share: float, centre: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Yun et al. 2019, section 3.1, as timm computes it: (B, C, H, W); the share is that of the pixels that stay."""
    height, width = images.shape[2:]
    ratio = math.sqrt(1 - share)
    bounds = []
    for size, middle in zip((height, width), centre, strict=True):
        side, place = int(size * ratio), int(middle * size)
        bounds.append((max(place - side // 2, 0), min(place + (side + 1) // 2, size)))
    (top, bottom), (left, right) = bounds
    mixed = images.clone()
    order = [partner(row) for row in range(len(images))]
    mixed[:, :, top:bottom, left:right] = images[order][:, :, top:bottom, left:right]
    stays = 1 - (bottom - top) * (right - left) / (height * width)
    return mixed, targets * stays + targets[order] * (1 - stays)


def survival(uniforms: Float[Tensor, "B depth 2"], rate: float) -> Float[Tensor, "B depth 2"]:
    """Drop path: a branch stays with chance `keep` and is divided by it; the rate rises with the block."""
    result = torch.empty_like(uniforms)
    depth = uniforms.shape[1]
    for block in range(depth):
        keep = 1 - rate * (block / (depth - 1) if depth > 1 else 0)
        result[:, block] = (uniforms[:, block] < keep).to(uniforms.dtype) / keep
    return result


def layer_rates(model: Classifier, decay: float) -> dict[str, float]:
    """Each parameter's share of the learning rate (Clark et al. 2020, section 3.3; Bao et al. 2021)."""
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
    """Cross entropy with targets that are shares."""
    return -(targets * functional.log_softmax(logits, dim=-1)).sum(dim=-1).mean()


def adamw(model: Classifier, config: FinetuneConfig) -> torch.optim.AdamW:
    """AdamW, one group a parameter: no decay of vectors and tables, rates by layer; the rate is to be set."""
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
    """The parameters by name."""
    return {name: p.detach().numpy().copy() for name, p in module.named_parameters()}
