"""Configuration: frozen dataclasses that are valid once they exist.

A combination that cannot work raises ValueError where it is built, naming both fields and their values.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Positions = Literal["sincos2d", "sincos1d", "learned"]
Masking = Literal["random", "block", "grid"]
AttentionKernel = Literal["xla", "cudnn"]
Dtype = Literal["float32", "bfloat16", "float64"]
Size = int | tuple[int, int]
Pooling = Literal["mean", "class"]  # mean of the patches, then a LayerNorm; or LayerNorm, then the class token

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
    pca_components: int | None = None  # predict so many principal components of each patch (Table 1d: 96)
    loss_on: Literal["hidden", "all"] = "hidden"
    encoder_mask_tokens: bool = False  # the encoder sees mask tokens, Table 1c's ablation
    dtype: Dtype = "float32"  # of matrix products; float64 makes everything float64, parameters included
    remat: bool = False  # recompute each block in the backward pass
    # What computes attention. cudnn needs an NVIDIA GPU and dtype bfloat16; its gradient may differ in the last bits
    # from one run to the next.
    attention: AttentionKernel = "xla"

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
        if self.pca_components is not None:
            self._check_pca()
        if self.masking == "block" and self.num_patches < 4:
            raise ValueError(f"masking block needs 4 patches or more, this model has {self.num_patches}")
        if self.masking == "grid":
            self._check_grid_masking()
        for name, allowed in (("dtype", get_args(Dtype)), ("attention", get_args(AttentionKernel))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)} is unknown (there are: {', '.join(allowed)})")
        if self.attention == "cudnn":
            self._check_cudnn()

    def _check_pca(self) -> None:
        if self.norm_pix_loss:
            raise ValueError(
                f"pca_components {self.pca_components} needs norm_pix_loss False: components are of plain pixels"
            )
        _require_whole(self, "pca_components")
        assert self.pca_components is not None
        if self.pca_components > self.patch_dim:
            raise ValueError(
                f"pca_components {self.pca_components} is more than the {self.patch_dim} values of a patch "
                f"(patch_size {self.patch_size}, in_channels {self.in_channels})"
            )

    def _check_cudnn(self) -> None:
        if self.dtype != "bfloat16":
            raise ValueError(f"attention cudnn needs dtype bfloat16, not {self.dtype}: give it, or attention xla")
        for stack in ("encoder", "decoder"):
            head_dim = getattr(self, stack).head_dim
            if head_dim % 8 or head_dim > 128:
                raise ValueError(
                    f"attention cudnn needs heads of a multiple of 8 values, at most 128: {stack}.width over "
                    f"{stack}.heads is {head_dim} (give attention xla)"
                )

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
    def target_dim(self) -> int:
        """Values that the decoder predicts of a patch."""
        return self.pca_components or self.patch_dim

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
    pooling: Pooling = "mean"
    drop_path: float = 0.0  # of the last block; the rate rises from 0 (Huang et al. 2016)

    def __post_init__(self) -> None:
        _require_whole(self, "classes")
        _require_unit_interval(self, "drop_path")
        if self.pooling == "class" and not self.model.class_token:
            raise ValueError("pooling class needs a class token, and model.class_token is False")


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
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale {self.scale} is not 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {self.ratio} is not 0 < low <= high")
        for name in ("color_jitter", "rand_augment_std"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} must be finite and not negative")
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
        """Whether pixels are altered after crop and flip."""
        return self.rand_augment is not None or self.color_jitter > 0


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
        _require_positive(self, "base_lr", "eps", "trust")
        _require_unit_interval(self, "beta1", "beta2", "momentum")
        for name in ("min_lr", "warmup_epochs", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} must be finite and not negative")
        if self.clip_norm is not None:
            _require_positive(self, "clip_norm")
        if self.ema_decay is not None:
            _require_unit_interval(self, "ema_decay")


@dataclass(frozen=True)
class RunConfig:
    """What every training run says: what is trained, on what, for how long, and where it is kept."""

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
    workdir: str = "runs/run"
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

    def __post_init__(self) -> None:
        _require_positive(self, "epochs")
        _require_whole(self, "batch_size", "accumulate", "log_every", "save_every", "keep", "repeats")
        for name in ("canvas_size", "steps", "devices", "fsdp", "num_processes", "keep_every"):
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
        if self.crops == "device" and self.augment.distorts:
            raise ValueError(
                f'crops "device" cuts on the device, augment.color_jitter {self.augment.color_jitter} and '
                f"augment.rand_augment {self.augment.rand_augment} work on the host's crops: take one or the other"
            )
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


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """One pretraining run, whole."""

    workdir: str = "runs/pretrain"
    reconstruct_every: int | None = 1000  # steps: a picture of reconstructions into the event file

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reconstruct_every is not None:
            _require_whole(self, "reconstruct_every")


@dataclass(frozen=True)
class MixConfig:
    """What is done to a batch of images and their classes (He et al. 2021, Table 9)."""

    smoothing: float = 0.0  # of the target, shared by all classes (Szegedy et al. 2015)
    mixup: float = 0.0  # alpha of the Beta distribution; 0 is off (Zhang et al. 2017)
    cutmix: float = 0.0  # the same (Yun et al. 2019)
    cutmix_share: float = 0.5  # of the batches, where both are on
    erase: float = 0.0  # share of the images in which a random rectangle becomes noise (Zhong et al. 2017)

    def __post_init__(self) -> None:
        _require_unit_interval(self, "smoothing")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} must be finite and not negative")
        for name in ("cutmix_share", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is outside [0, 1]")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """One run of a classifier on an encoder: fine-tuned, in part or whole, or linear probing."""

    workdir: str = "runs/finetune"
    pooling: Pooling = "mean"
    classes: int | None = None  # by default those of the data
    drop_path: float = 0.0  # of the last block; the rate rises from 0 (Huang et al. 2016)
    layer_decay: float = 1.0  # each block learns so many times slower than the next (Clark et al. 2020)
    last_blocks: int | None = None  # train these and the head alone; 0: linear probing
    batch_norm: bool = False  # normalise features in front of the head, without scale and bias (appendix A.1)
    sweep: tuple[float, ...] = ()  # base rates of as many heads, in place of optim.base_lr; all learn at once
    head_std: float = 2e-5  # of the head's first weights
    mix: MixConfig = MixConfig()
    holdout: int = 5  # where data has no split val, one image of so many is kept from training to evaluate on
    evaluate_every: float = 1.0  # epochs

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "head_std", "evaluate_every")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay {self.layer_decay} is outside (0, 1]")
        depth = self.model.encoder.depth
        if self.last_blocks is not None and not 0 <= self.last_blocks <= depth:
            raise ValueError(f"last_blocks {self.last_blocks} is not in 0 .. {depth}, the encoder's depth")
        if self.holdout < 2:
            raise ValueError(f"holdout {self.holdout} must be 2 or more: one image of so many is kept from training")
        for name in ("batch_norm", "sweep"):
            if getattr(self, name) and self.last_blocks != 0:
                raise ValueError(f"{name} {getattr(self, name)} is for linear probing: it needs last_blocks 0")
        if self.batch_norm and self.accumulate > 1:
            raise ValueError(
                f"batch_norm takes its statistics of the whole batch: accumulate {self.accumulate} is not 1"
            )
        if not all(0 < rate < math.inf for rate in self.sweep) or len(set(self.sweep)) < len(self.sweep):
            raise ValueError(f"sweep {self.sweep} must be different rates, positive and finite")
        if self.sweep and self.optim.min_lr > 0:
            raise ValueError(f"sweep {self.sweep} scales whole curves: optim.min_lr {self.optim.min_lr} must be 0")
        if self.mix.mixes and self.repeats > 1:
            raise ValueError(f"mixup and cutmix would mix an image with itself: repeats {self.repeats} is not 1")
        if self.classes is not None:
            _ = self.classifier

    @property
    def classifier(self) -> ClassifierConfig:
        """The model.

        Raises:
          ValueError: `classes` is not known yet, or the model has no such classifier.
        """
        if self.classes is None:
            raise ValueError("classes is not known yet")
        return ClassifierConfig(self.model, self.classes, self.pooling, self.drop_path)


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
