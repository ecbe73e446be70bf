"""The model: two stacks of blocks, patches, masks, target; and the classifier on its encoder."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from mae_jax.config.checks import require_choices, require_positive, require_unit_interval, require_whole

Positions = Literal["sincos2d", "sincos1d", "learned"]
Masking = Literal["random", "block", "grid"]
AttentionKernel = Literal["xla", "cudnn"]
Dtype = Literal["float32", "bfloat16", "float64"]
Size = int | tuple[int, int]
Pooling = Literal["mean", "class"]  # mean of the patches, then a LayerNorm; or LayerNorm, then the class token


def wide(dtype: Dtype) -> Dtype:
    """Return the dtype of everything but matrix products: parameters, residual stream, LayerNorm, softmax, loss."""
    return "float64" if dtype == "float64" else "float32"


def _height_width(size: Size) -> tuple[int, int]:
    """Return height and width of what may be given as one side."""
    if isinstance(size, int):
        return size, size
    if len(size) != 2:
        raise ValueError(f"{size} is not a side, nor height and width")
    return size[0], size[1]


def _divisors(size: int) -> list[int]:
    """List the divisors of a side in order; of more than 10^8 pixels only those below 10^4 and their cofactors."""
    small = [divisor for divisor in range(1, min(math.isqrt(size), 10**4) + 1) if size % divisor == 0]
    return sorted({*small, *(size // divisor for divisor in small)})


@dataclass(frozen=True)
class TransformerConfig:
    """A stack of pre-norm blocks (He et al. 2021, section 3; Dosovitskiy et al. 2020)."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        require_whole(self, "width", "depth", "heads")
        require_positive(self, "mlp_ratio")
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

    kind: ClassVar[Literal["mae"]] = "mae"

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
    # What computes attention. cudnn needs dtype bfloat16 and an NVIDIA GPU of compute capability 8.0 or more; its
    # gradient may differ in the last bits from one run to the next.
    attention: AttentionKernel = "xla"

    def __post_init__(self) -> None:
        require_choices(self)
        require_whole(self, "in_channels")
        for size, patch in zip(self.image_hw, self.patch_hw, strict=True):
            if patch <= 0 or size <= 0:
                raise ValueError(f"image_size {self.image_size} and patch_size {self.patch_size} must be positive")
            if size % patch:
                nearest = sorted(_divisors(size), key=lambda divisor: abs(divisor - patch))[:2]
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
        if self.attention == "cudnn":
            self._check_cudnn()

    def _check_pca(self) -> None:
        if self.norm_pix_loss:
            raise ValueError(
                f"pca_components {self.pca_components} needs norm_pix_loss False: components are of plain pixels"
            )
        require_whole(self, "pca_components")
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
        """Return image height and width in pixels."""
        return _height_width(self.image_size)

    @property
    def patch_hw(self) -> tuple[int, int]:
        """Return patch height and width in pixels."""
        return _height_width(self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Return rows and columns of patches."""
        (height, width), (patch_height, patch_width) = self.image_hw, self.patch_hw
        return height // patch_height, width // patch_width

    @property
    def grid_stride(self) -> int:
        """Return s, where masking `grid` keeps one patch of every s x s."""
        return round((self.num_patches / self.keep) ** 0.5)

    @property
    def num_patches(self) -> int:
        """Return L, the number of patches."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_dim(self) -> int:
        """Return P, the number of values in one patch, all channels."""
        return self.patch_hw[0] * self.patch_hw[1] * self.in_channels

    @property
    def target_dim(self) -> int:
        """Return how many values of a patch the decoder predicts."""
        return self.pca_components or self.patch_dim

    @property
    def keep(self) -> int:
        """Return how many patches stay visible: int(L * (1 - ratio)) in float64, as the authors count."""
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

    kind: ClassVar[Literal["classifier"]] = "classifier"

    model: ModelConfig = ModelConfig()  # of which the decoder and the masks play no part
    classes: int = 1000
    pooling: Pooling = "mean"
    drop_path: float = 0.0  # of the last block; the rate rises from 0 (Huang et al. 2016)

    def __post_init__(self) -> None:
        require_choices(self)
        require_whole(self, "classes")
        require_unit_interval(self, "drop_path")
        if self.pooling == "class" and not self.model.class_token:
            raise ValueError("pooling class needs a class token, and model.class_token is False")
