"""Configuration: frozen dataclasses that are valid once they exist.

A combination that cannot work raises ValueError where it is built, naming both fields and their values.
"""

import math
from dataclasses import dataclass
from typing import Literal

Positions = Literal["sincos2d", "sincos1d", "learned"]
Masking = Literal["random", "block", "grid"]
Dtype = Literal["float32", "bfloat16", "float64"]
Size = int | tuple[int, int]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def wide(dtype: Dtype) -> Dtype:
    """The dtype of everything but matrix products: parameters, residual stream, LayerNorm, softmax, loss."""
    return "float64" if dtype == "float64" else "float32"


def _require_positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} {value} must be positive and finite")


def _require_whole(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} {value!r} must be a whole number, 1 or more")


def _require_unit_interval(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not 0 <= value < 1:
            raise ValueError(f"{name} {value} is outside [0, 1)")


def _height_width(size: Size) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if len(size) != 2:
        raise ValueError(f"{size} is not a side, nor height and width")
    return size[0], size[1]


@dataclass(frozen=True)
class TransformerConfig:
    """A stack of pre-norm blocks (He et al. 2021, section 3; Dosovitskiy et al. 2020)."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        _require_whole(self, "width", "depth", "heads")
        _require_positive(self, "mlp_ratio")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if not float(self.width * self.mlp_ratio).is_integer():
            raise ValueError(f"width {self.width} times mlp_ratio {self.mlp_ratio} is not a whole number")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True)
class ModelConfig:
    """A masked autoencoder. The defaults are ViT-B/16 at 224 with the paper's decoder (He et al. 2021, Table 1)."""

    image_size: Size = 224  # pixels: a side, or (height, width)
    patch_size: Size = 16
    in_channels: int = 3
    encoder: TransformerConfig = TransformerConfig(width=768, depth=12, heads=12)
    decoder: TransformerConfig = TransformerConfig(width=512, depth=8, heads=16)
    positions: Positions = "sincos2d"
    class_token: bool = True
    masking: Masking = "random"  # Table 1f
    mask_ratio: float = 0.75
    norm_pix_loss: bool = False  # predict pixels normalised inside each patch (Table 1d)
    loss_on: Literal["hidden", "all"] = "hidden"
    encoder_mask_tokens: bool = False  # the encoder sees mask tokens, Table 1c's ablation
    dtype: Dtype = "float32"  # of matrix products; float64 makes everything float64, parameters included
    remat: bool = False  # recompute each block in the backward pass

    def __post_init__(self) -> None:
        _require_whole(self, "in_channels")
        for size, patch in zip(self.image_hw, self.patch_hw, strict=True):
            if patch <= 0 or size <= 0:
                raise ValueError(f"image_size {self.image_size} and patch_size {self.patch_size} must be positive")
            if size % patch:
                nearest = sorted((p for p in range(1, size + 1) if size % p == 0), key=lambda p: abs(p - patch))[:2]
                raise ValueError(
                    f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size} "
                    f"(nearest that divide {size}: {', '.join(map(str, sorted(nearest)))})"
                )
        if not math.isfinite(self.mask_ratio) or self.keep < 1:
            raise ValueError(f"mask_ratio {self.mask_ratio} keeps none of the {self.num_patches} patches")
        if self.keep >= self.num_patches:
            raise ValueError(f"mask_ratio {self.mask_ratio} hides none of the {self.num_patches} patches")
        divisor = {"sincos2d": 4, "sincos1d": 2, "learned": 1}[self.positions]
        for stack in ("encoder", "decoder"):
            width = getattr(self, stack).width
            if width % divisor:
                raise ValueError(
                    f"{stack}.width {width} is not divisible by {divisor}, which positions {self.positions} needs"
                )
        if self.norm_pix_loss and self.patch_dim < 2:
            raise ValueError(f"norm_pix_loss needs 2 values in a patch or more, patch_size {self.patch_size} gives 1")
        if self.masking == "block" and self.num_patches < 4:
            raise ValueError(f"masking block needs 4 patches or more, this model has {self.num_patches}")
        if self.masking == "grid":
            self._check_grid_masking()

    def _check_grid_masking(self) -> None:
        stride = self.grid_stride
        rows, columns = self.grid
        if stride < 2 or rows % stride or columns % stride or rows * columns // stride**2 != self.keep:
            raise ValueError(
                f"mask_ratio {self.mask_ratio} with masking grid on {rows} x {columns} patches: "
                "it keeps one patch of every s x s, so the ratio must be 1 - 1/s^2 (0.75, 0.9375 ...) and s divide both"
            )

    @property
    def image_hw(self) -> tuple[int, int]:
        """Image height and width in pixels."""
        return _height_width(self.image_size)

    @property
    def patch_hw(self) -> tuple[int, int]:
        """Patch height and width in pixels."""
        return _height_width(self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        (height, width), (patch_height, patch_width) = self.image_hw, self.patch_hw
        return height // patch_height, width // patch_width

    @property
    def grid_stride(self) -> int:
        """s, where masking `grid` keeps one patch of every s x s."""
        return round((self.num_patches / self.keep) ** 0.5)

    @property
    def num_patches(self) -> int:
        """L."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_dim(self) -> int:
        """P: values in one patch, all channels."""
        return self.patch_hw[0] * self.patch_hw[1] * self.in_channels

    @property
    def keep(self) -> int:
        """Patches that stay visible: int(L * (1 - ratio)) in float64, as the authors count."""
        return int(self.num_patches * (1 - self.mask_ratio))


# Widths, depths and heads: tiny and small from Touvron et al. 2020 (DeiT), Table 1; base, large and huge from
# Dosovitskiy et al. 2020, Table 1. The decoder is the paper's default, 512 wide and 8 deep with 16 heads (Table 1).
MODELS = {
    "vit_tiny_patch16": ModelConfig(encoder=TransformerConfig(192, 12, 3)),
    "vit_small_patch16": ModelConfig(encoder=TransformerConfig(384, 12, 6)),
    "vit_base_patch16": ModelConfig(encoder=TransformerConfig(768, 12, 12)),
    "vit_large_patch16": ModelConfig(encoder=TransformerConfig(1024, 24, 16)),
    "vit_huge_patch14": ModelConfig(encoder=TransformerConfig(1280, 32, 16), patch_size=14),
}


@dataclass(frozen=True)
class ClassifierConfig:
    """An encoder with a linear head (He et al. 2021, section 4 and appendix A.1)."""

    model: ModelConfig = ModelConfig()  # of which the decoder and the masks play no part
    classes: int = 1000
    pooling: Literal["mean", "class"] = "mean"  # mean of the patches, then a LayerNorm; or LayerNorm, then class token

    def __post_init__(self) -> None:
        _require_positive(self, "classes")
        if self.pooling == "class" and not self.model.class_token:
            raise ValueError("pooling class needs a class token, and model.class_token is False")


@dataclass(frozen=True)
class AugmentConfig:
    """What happens to an image between the file and the model (He et al. 2021, appendix A.1)."""

    crop: Literal["random", "center"] = "random"  # center: scale the shorter side to the image size, cut the middle
    scale: tuple[float, float] = (0.2, 1.0)  # of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width to height
    flip: bool = True  # left to right, half of the time
    resize: Literal["exact", "fast"] = "exact"  # fast: scaled decoding and OpenCV; a grey level off on average
    mean: tuple[float, ...] = IMAGENET_MEAN  # of channels scaled to 0 .. 1, subtracted on the device
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale {self.scale} is not 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {self.ratio} is not 0 < low <= high")
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean {self.mean} and std {self.std} have different lengths")
        if not all(math.isfinite(m) for m in self.mean):
            raise ValueError(f"mean {self.mean} must be finite")
        if not all(0 < s < math.inf for s in self.std):
            raise ValueError(f"std {self.std} must be positive and finite")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule (He et al. 2021, Table 8)."""

    base_lr: float = 1.5e-4  # at a global batch of 256; scaled linearly
    min_lr: float = 0.0
    warmup_epochs: float = 40.0
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float | None = None  # largest global gradient norm
    ema_decay: float | None = None  # of a running average of the parameters

    def __post_init__(self) -> None:
        _require_positive(self, "base_lr", "eps")
        _require_unit_interval(self, "beta1", "beta2")
        for name in ("min_lr", "warmup_epochs", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} must be finite and not negative")
        if self.clip_norm is not None:
            _require_positive(self, "clip_norm")
        if self.ema_decay is not None:
            _require_unit_interval(self, "ema_decay")


@dataclass(frozen=True)
class PretrainConfig:
    """One pretraining run, whole: what is trained, on what, for how long, and where it is kept."""

    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    data: str = "digits"  # digits | folder:PATH | tfds:NAME[@SPLIT] | records:PATH
    repeats: int = 1  # crops of each decoded image in a batch (Hoffer et al. 2019); an epoch counts crops
    crops: Literal["host", "device"] = "host"  # where they are cut: device ships whole images, squeezed into a square
    canvas_size: int | None = None  # side of that square; by default 8/7 of the image's longer side
    batch_size: int = 256  # global
    accumulate: int = 1  # gradients of this many equal parts of the batch are averaged before the update
    epochs: float = 800.0
    steps: int | None = None  # in place of epochs
    seed: int = 0

    init: str | None = None  # start from these weights: a run, or a PyTorch checkpoint that `mae-jax port` reads
    workdir: str = "runs/pretrain"
    engine: Literal["pmap", "jit", "fsdp"] = "pmap"  # pmap: one host; fsdp: the state is cut over devices
    devices: int | None = None  # the first so many devices of each host; all by default
    fsdp: int | None = None  # devices that engine fsdp cuts one copy of the state over; by default all
    coordinator: str | None = None  # HOST:PORT of host 0, where several hosts run together
    process_id: int | None = None  # which of them this one is, 0 .. num_processes - 1
    num_processes: int | None = None  # how many they are
    workers: int | None = None  # processes that read and crop; by default as many as the data wants and the cores allow
    log_every: int = 50  # steps
    save_every: int = 1000  # steps
    keep: int = 3  # newest checkpoints
    keep_every: int | None = None  # steps: checkpoints at multiples of this are kept for good
    reconstruct_every: int | None = 1000  # steps: a picture of reconstructions into the event file

    def __post_init__(self) -> None:
        _require_positive(self, "epochs")
        _require_whole(self, "batch_size", "accumulate", "log_every", "save_every", "keep", "repeats")
        for name in ("canvas_size", "steps", "devices", "fsdp", "num_processes", "keep_every", "reconstruct_every"):
            if getattr(self, name) is not None:
                _require_whole(self, name)
        if self.keep_every is not None and self.keep_every % self.save_every:
            raise ValueError(f"keep_every {self.keep_every} is not a multiple of save_every {self.save_every}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}")
        if self.batch_size % self.repeats:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by repeats {self.repeats}")
        if self.canvas_size is not None and self.crops == "host":
            raise ValueError(f'canvas_size {self.canvas_size} is for crops "device", crops is "host"')
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed} is outside 0 .. 2^32 - 1")
        if self.fsdp is not None and self.engine != "fsdp":
            raise ValueError(f"fsdp {self.fsdp} needs engine fsdp, not {self.engine}")
        self._check_hosts()
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers {self.workers} must not be negative")
        if len(self.augment.mean) != self.model.in_channels:
            raise ValueError(
                f"augment.mean {self.augment.mean} has {len(self.augment.mean)} values, "
                f"model.in_channels is {self.model.in_channels}"
            )

    @property
    def canvas(self) -> int:
        """Side of the square that an image is squeezed into where the device cuts the crops."""
        return self.canvas_size or round(max(self.model.image_hw) * 8 / 7)

    def _check_hosts(self) -> None:
        given = {name: getattr(self, name) for name in ("coordinator", "process_id", "num_processes")}
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            there = ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)
            raise ValueError(f"{there} needs {' and '.join(missing)} too")
        if missing:
            return
        if not 0 <= given["process_id"] < given["num_processes"]:
            raise ValueError(f"process_id {self.process_id} is outside 0 .. num_processes {self.num_processes} - 1")
        host, _, port = given["coordinator"].rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"coordinator {self.coordinator} is not HOST:PORT")


# Fields in which the hosts of one run may differ.
OF_ONE_HOST = frozenset({"coordinator", "process_id", "workers"})

# Fields that change where and how fast a run goes, not what it computes: they may differ when a run continues.
OPERATIONAL = OF_ONE_HOST | {
    "num_processes",
    "workdir",
    "engine",
    "devices",
    "fsdp",
    "log_every",
    "save_every",
    "keep",
    "keep_every",
    "reconstruct_every",
}
