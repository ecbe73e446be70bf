"""How a model is trained: what happens to images before it sees them, the optimizer and its schedule."""

import math
from dataclasses import dataclass
from typing import Literal

from mae_jax.config.checks import require_choices, require_not_negative, require_positive, require_unit_interval

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class AugmentConfig:
    """What happens to an image between the file and the model (He et al. 2021, appendix A.1)."""

    # random: a part of any size and shape; fixed: the shorter side scaled to 8/7 of the image size (256 for 224), a box
    # of the image size cut anywhere (Table 1e); center: the shorter side scaled to the image size, the middle cut out
    crop: Literal["random", "fixed", "center"] = "random"
    scale: tuple[float, float] = (0.2, 1.0)  # of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width to height
    flip: bool = True  # left to right, half of the time
    resize: Literal["exact", "fast"] = "exact"  # fast: scaled decoding and OpenCV, a grey level off; random crops only
    color_jitter: float = 0.0  # brightness, contrast and saturation times 1 - this .. 1 + this (Table 1e); 0: none
    rand_augment: float | None = None  # magnitude, 0 .. 10, of timm's rand-m*-inc1 (Cubuk et al. 2019), 9 in Table 9
    rand_augment_std: float = 0.5  # of the magnitude from one operation to the next
    evaluation_crop: float = 1.0  # of the shorter side, in the centre crops of evaluation; 0.875: 224 out of 256
    mean: tuple[float, ...] = IMAGENET_MEAN  # of channels scaled to 0 .. 1, subtracted on the device
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        require_choices(self)
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale {self.scale} is not 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {self.ratio} is not 0 < low <= high")
        require_not_negative(self, "color_jitter", "rand_augment_std")
        if self.rand_augment is not None and not 0 <= self.rand_augment <= 10:
            raise ValueError(f"rand_augment {self.rand_augment} is outside 0 .. 10")
        if not 0 < self.evaluation_crop <= 1:
            raise ValueError(f"evaluation_crop {self.evaluation_crop} is outside (0, 1]")
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean {self.mean} and std {self.std} have different lengths")
        if not all(math.isfinite(m) for m in self.mean):
            raise ValueError(f"mean {self.mean} must be finite")
        if not all(0 < s < math.inf for s in self.std):
            raise ValueError(f"std {self.std} must be positive and finite")

    @property
    def distorts(self) -> bool:
        """Return whether pixels are altered after crop and flip."""
        return self.rand_augment is not None or self.color_jitter > 0


@dataclass(frozen=True)
class MixConfig:
    """What is done to a batch of images and their classes (He et al. 2021, Table 9)."""

    smoothing: float = 0.0  # of the target, shared by all classes (Szegedy et al. 2015)
    mixup: float = 0.0  # alpha of the Beta distribution; 0 is off (Zhang et al. 2017)
    cutmix: float = 0.0  # the same (Yun et al. 2019)
    cutmix_share: float = 0.5  # of the batches, where both are on
    erase: float = 0.0  # share of the images in which a random rectangle becomes noise (Zhong et al. 2017)

    def __post_init__(self) -> None:
        require_unit_interval(self, "smoothing")
        require_not_negative(self, "mixup", "cutmix")
        for name in ("cutmix_share", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is outside [0, 1]")

    @property
    def mixes(self) -> bool:
        """Return whether images are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0


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
        require_choices(self)
        require_positive(self, "base_lr", "eps", "trust")
        require_unit_interval(self, "beta1", "beta2", "momentum")
        require_not_negative(self, "min_lr", "warmup_epochs", "weight_decay")
        if self.clip_norm is not None:
            require_positive(self, "clip_norm")
        if self.ema_decay is not None:
            require_unit_interval(self, "ema_decay")
