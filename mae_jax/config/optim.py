"""The optimizer and its schedule."""

import math
from dataclasses import dataclass
from typing import Literal

from mae_jax.config.checks import require_positive, require_unit_interval


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule (He et al. 2021, Tables 8 to 10)."""

    optimizer: Literal["adamw", "lars"] = "adamw"
    base_lr: float = 1.5e-4  # at a global batch of 256; scaled linearly
    min_lr: float = 0.0
    warmup_epochs: float = 40.0
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.9  # of LARS
    trust: float = 0.001  # of LARS: a step's length over the weights' length, at rate 1
    clip_norm: float | None = None  # largest global gradient norm
    ema_decay: float | None = None  # of a running average of the parameters

    def __post_init__(self) -> None:
        require_positive(self, "base_lr", "eps", "trust")
        require_unit_interval(self, "beta1", "beta2", "momentum")
        for name in ("min_lr", "warmup_epochs", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} must be finite and not negative")
        if self.clip_norm is not None:
            require_positive(self, "clip_norm")
        if self.ema_decay is not None:
            require_unit_interval(self, "ema_decay")
