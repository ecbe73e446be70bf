"""The PyTorch reference: Masked Autoencoders (He et al. 2021, arXiv 2111.06377), to be read beside the paper.

Written for clarity, in the textbook order: every patch is projected, positions are added, then the hidden ones are
dropped. Parameters carry the names of the authors' published checkpoints. It shares nothing with `mae_jax` but the
configuration and its sums (rows and columns, values in a patch, the stride of a grid mask): positions and masks are
computed here a second time, by plain loops.

    B batch, L patches, K visible patches, P values in a patch, D encoder width, d decoder width
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from mae_jax.config import ClassifierConfig, ModelConfig, TransformerConfig

EPS = 1e-6  # of every LayerNorm, and of the normalised target


@dataclass
class Output:
    """What one forward pass gives, and all it passed on the way."""

    loss: Float[Tensor, ""]
    pred: Float[Tensor, "B L P"]
    target: Float[Tensor, "B L P"]
    mask: Float[Tensor, "B L"]  # 1 hidden, 0 visible, in image order
    ids_restore: Int[Tensor, "B L"]
    latent: Float[Tensor, "B tokens D"]
    stages: dict[str, Tensor]  # every intermediate by name, in the order data flows


# --- patches -----------------------------------------------------------------------------------------------------


def patchify(images: Float[Tensor, "B C H W"], patch_hw: tuple[int, int]) -> Float[Tensor, "B L P"]:
    """Cut images into patches, row by row; a patch is its rows, columns, then channels."""
    batch, channels, height, width = images.shape
    ph, pw = patch_hw
    cut = images.reshape(batch, channels, height // ph, ph, width // pw, pw)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, ph * pw * channels)


def unpatchify(
    patches: Float[Tensor, "B L P"], grid: tuple[int, int], patch_hw: tuple[int, int]
) -> Float[Tensor, "B C H W"]:
    """Lay patches back into images."""
    (rows, columns), (ph, pw) = grid, patch_hw
    laid = patches.reshape(len(patches), rows, columns, ph, pw, -1).permute(0, 5, 1, 3, 2, 4)
    return laid.reshape(len(patches), -1, rows * ph, columns * pw)


# --- positions ---------------------------------------------------------------------------------------------------


def sincos2d(width: int, grid: tuple[int, int]) -> Float[Tensor, "L width"]:
    """Compute 2-D positions: [sin x, cos x, sin y, cos y], a quarter of the width each (Chen et al. 2021)."""
    rows, columns = grid
    quarter = width // 4
    table = np.zeros((rows * columns, width))
    for y in range(rows):
        for x in range(columns):
            for k in range(quarter):
                omega = 10000 ** -(k / quarter)
                parts = [math.sin(x * omega), math.cos(x * omega), math.sin(y * omega), math.cos(y * omega)]
                table[y * columns + x, k::quarter] = parts
    return torch.from_numpy(table.astype(np.float32))


def sincos1d(width: int, length: int) -> Float[Tensor, "L width"]:
    """Compute 1-D positions: sin on even channels, cos on odd ones (Vaswani et al. 2017, section 3.5)."""
    table = np.zeros((length, width))
    for position in range(length):
        for k in range(width // 2):
            angle = position * 10000 ** -(2 * k / width)
            table[position, 2 * k : 2 * k + 2] = math.sin(angle), math.cos(angle)
    return torch.from_numpy(table.astype(np.float32))


def positions(config: ModelConfig, width: int) -> Float[Tensor, "1 tokens width"]:
    """Return the table added to the tokens; the class token's row comes first and is zero. Zeros where learned."""
    if config.positions == "sincos2d":
        table = sincos2d(width, config.grid)
    elif config.positions == "sincos1d":
        table = sincos1d(width, config.num_patches)
    else:
        table = torch.zeros(config.num_patches, width)
    if config.class_token:
        table = torch.cat([table.new_zeros(1, width), table])
    return table[None]


# --- masks -------------------------------------------------------------------------------------------------------


def visible_count(config: ModelConfig) -> int:
    """Return K, counted as the authors count: the product is cut off, in float64."""
    return int(config.grid[0] * config.grid[1] * (1 - config.mask_ratio))


def shuffle(config: ModelConfig, noise: Float[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Order the patches, those that stay visible first (section 3; Table 1f for block and grid)."""
    if config.masking == "block" and config.num_patches >= 4:
        return torch.tensor([block_order(row, config.grid) for row in noise.tolist()])
    if config.masking == "grid":
        return torch.tensor([grid_order(row, config.grid, config.grid_stride) for row in noise.tolist()])
    return torch.argsort(noise, dim=1, stable=True)


def block_order(noise: list[float], grid: tuple[int, int]) -> list[int]:
    """Hide patches by rectangles (Bao et al. 2021, BEiT, algorithm 1), each drawn from four uniforms of the noise.

    Patches are hidden rectangle after rectangle, row by row inside one, then those that no rectangle covers.
    The order returned is the reverse: those hidden last come first.
    """
    rows, columns = grid
    hiding_order = []
    for r in range(len(noise) // 4):
        u_area, u_aspect, u_top, u_left = noise[4 * r : 4 * r + 4]
        area = rows * columns * (0.1 + 0.3 * u_area)  # patches
        aspect = math.exp((2 * u_aspect - 1) * math.log(1 / 0.3))  # height to width
        height = min(max(round(math.sqrt(area * aspect)), 1), rows)
        width = min(max(round(math.sqrt(area / aspect)), 1), columns)
        top = math.floor(u_top * (rows - height + 1))
        left = math.floor(u_left * (columns - width + 1))
        for y in range(top, top + height):
            hiding_order += [y * columns + x for x in range(left, left + width)]
    hiding_order += range(rows * columns)
    return list(dict.fromkeys(hiding_order))[::-1]


def grid_order(noise: list[float], grid: tuple[int, int], stride: int) -> list[int]:
    """Keep one patch of every stride x stride, the same one everywhere: where the first noise values are smallest."""
    rows, columns = grid
    cell = noise[: stride * stride]
    offset = divmod(cell.index(min(cell)), stride)
    kept: list[int] = []
    hidden: list[int] = []
    for y in range(rows):
        for x in range(columns):
            stays = (y % stride, x % stride) == offset
            (kept if stays else hidden).append(y * columns + x)
    return kept + hidden


# --- transformer -------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention; queries, keys and values come from one product, in that order."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, head_dim)
        mixed = functional.scaled_dot_product_attention(query, key, value)  # scale head_dim^-1/2
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two dense layers with the exact GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=EPS)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=EPS)
        self.mlp = Mlp(config.width, config.mlp_width)

    def forward(
        self, x: Float[Tensor, "B T D"], survival: Float[Tensor, "B 2"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Add attention, then MLP; `survival` multiplies each branch, example by example (drop path)."""
        first, second = (1.0, 1.0) if survival is None else (survival[:, 0, None, None], survival[:, 1, None, None])
        x = x + first * self.attn(self.norm1(x))
        return x + second * self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Every patch to a token: a convolution whose stride is its kernel.

    It is computed as the product with each patch that it is: in float32 oneDNN's convolution of 768 values alone
    rounds by 1.5e-6 of the largest, the product by 6e-7.
    """

    def __init__(self, channels: int, width: int, patch_hw: tuple[int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_hw, stride=patch_hw)
        self.patch_hw = patch_hw

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B L D"]:
        kernel = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P): row, column, channel, as in a patch
        return functional.linear(patchify(images, self.patch_hw), kernel, self.proj.bias)


# --- target ------------------------------------------------------------------------------------------------------


def principal_components(
    patches: Float[Tensor, "N P"], count: int
) -> tuple[Float[Tensor, " P"], Float[Tensor, "P count"]]:
    """Compute the mean of patches, and the directions in which they vary most (Table 1d)."""
    mean = patches.mean(dim=0)
    directions = torch.linalg.svd(patches - mean, full_matrices=False).Vh
    return mean, directions[:count].T.contiguous()


class PrincipalComponents(nn.Module):
    """Patches to coefficients: the basis is fitted beforehand, and never trained."""

    mean: Float[Tensor, " P"]
    basis: Float[Tensor, "P count"]

    def __init__(self, values: int, count: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("basis", torch.zeros(values, count))

    def forward(self, patches: Float[Tensor, "B L P"]) -> Float[Tensor, "B L count"]:
        return (patches - self.mean) @ self.basis


def prediction_target(config: ModelConfig, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B L P"]:
    """Return the pixels of each patch, or pixels normalised inside it: unbiased variance (Table 1d)."""
    target = patchify(images, config.patch_hw)
    if config.norm_pix_loss:
        mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True, correction=1)
        target = (target - mean) / (var + EPS) ** 0.5
    return target


# --- masked autoencoder ------------------------------------------------------------------------------------------


class MaskedAutoencoder(nn.Module):
    """Encoder, decoder and loss of section 3. Weights are to be loaded: nothing here follows the paper's init."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        D, d, learned = config.encoder.width, config.decoder.width, config.positions == "learned"

        self.patch_embed = PatchEmbed(config.in_channels, D, config.patch_hw)
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(positions(config, D), requires_grad=learned)
        if config.encoder_mask_tokens:
            self.encoder_mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.blocks = nn.ModuleList([Block(config.encoder) for _ in range(config.encoder.depth)])
        self.norm = nn.LayerNorm(D, eps=EPS)

        self.decoder_embed = nn.Linear(D, d)
        if not config.encoder_mask_tokens:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, d))
        self.decoder_pos_embed = nn.Parameter(positions(config, d), requires_grad=learned)
        self.decoder_blocks = nn.ModuleList([Block(config.decoder) for _ in range(config.decoder.depth)])
        self.decoder_norm = nn.LayerNorm(d, eps=EPS)
        self.decoder_pred = nn.Linear(d, config.target_dim)
        if config.pca_components is not None:
            self.target = PrincipalComponents(config.patch_dim, config.pca_components)

    def forward(self, images: Float[Tensor, "B C H W"], noise: Float[Tensor, "B L"]) -> Output:
        stages: dict[str, Tensor] = {}

        ids_shuffle = shuffle(self.config, noise)
        ids_restore = torch.argsort(ids_shuffle, dim=1, stable=True)
        ids_keep = ids_shuffle[:, : visible_count(self.config)]
        mask = torch.ones_like(images[:, 0, 0, :1]).repeat(1, self.config.num_patches).scatter(1, ids_keep, 0.0)
        stages |= {"ids_keep": ids_keep, "ids_restore": ids_restore, "mask": mask}

        latent = self.encode(images, ids_keep, mask, stages)
        pred = self.decode(latent, ids_restore, stages)
        target = prediction_target(self.config, images)
        if self.config.pca_components is not None:
            target = self.target(target)
        loss = self.loss(pred, target, mask)
        stages |= {"pred": pred, "target": target, "loss": loss}
        return Output(loss, pred, target, mask, ids_restore, latent, stages)

    def encode(
        self, images: Tensor, ids_keep: Int[Tensor, "B K"], mask: Float[Tensor, "B L"], stages: dict[str, Tensor]
    ) -> Float[Tensor, "B tokens D"]:
        """Encode the visible patches; all patches where the encoder sees mask tokens (Table 1c)."""
        first_patch = int(self.config.class_token)
        x = stages["patch_embed"] = self.patch_embed(images)
        if self.config.encoder_mask_tokens:
            x = torch.where(mask[..., None] == 1, self.encoder_mask_token, x)
        x = x + self.pos_embed[:, first_patch:]
        if not self.config.encoder_mask_tokens:
            x = take(x, ids_keep)
        if self.config.class_token:
            class_token = self.cls_token + self.pos_embed[:, :1]
            x = torch.cat([class_token.expand(len(x), -1, -1), x], dim=1)
        stages["encoder.input"] = x
        for i, block in enumerate(self.blocks):
            x = stages[f"encoder.block_{i}"] = block(x)
        x = stages["latent"] = self.norm(x)
        return x

    def encode_whole(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B tokens D"]:
        """Encode with every patch visible."""
        every = torch.arange(self.config.num_patches).expand(len(images), -1)
        return self.encode(images, every, torch.zeros(every.shape), {})

    def decode(
        self, latent: Float[Tensor, "B tokens D"], ids_restore: Int[Tensor, "B L"], stages: dict[str, Tensor]
    ) -> Float[Tensor, "B L P"]:
        """Decode latents and mask tokens, back in image order, to the pixels of every patch."""
        first_patch = int(self.config.class_token)
        x = stages["decoder.embed"] = self.decoder_embed(latent)
        if not self.config.encoder_mask_tokens:
            class_token, patches = x[:, :first_patch], x[:, first_patch:]
            hidden = ids_restore.shape[1] - patches.shape[1]
            shuffled = torch.cat([patches, self.mask_token.expand(len(x), hidden, -1)], dim=1)
            x = torch.cat([class_token, take(shuffled, ids_restore)], dim=1)
        x = stages["decoder.input"] = x + self.decoder_pos_embed
        for i, block in enumerate(self.decoder_blocks):
            x = stages[f"decoder.block_{i}"] = block(x)
        x = stages["decoder.norm"] = self.decoder_norm(x)
        return self.decoder_pred(x)[:, first_patch:]

    def loss(self, pred: Tensor, target: Tensor, mask: Float[Tensor, "B L"]) -> Float[Tensor, ""]:
        """Average the squared error over the hidden patches, or over all."""
        if self.config.loss_on == "all":
            mask = torch.ones_like(mask)
        per_patch = ((pred - target) ** 2).mean(dim=-1)
        return (per_patch * mask).sum() / mask.sum()


class Classifier(nn.Module):
    """The encoder with a linear head, as the authors fine-tune it: the mean of the patches or the class token."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        model, D = config.model, config.model.encoder.width
        self.patch_embed = PatchEmbed(model.in_channels, D, model.patch_hw)
        if model.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(positions(model, D), requires_grad=model.positions == "learned")
        self.blocks = nn.ModuleList([Block(model.encoder) for _ in range(model.encoder.depth)])
        if config.pooling == "mean":
            self.fc_norm = nn.LayerNorm(D, eps=EPS)
        else:
            self.norm = nn.LayerNorm(D, eps=EPS)
        self.head = nn.Linear(D, config.classes)

    def forward(
        self, images: Float[Tensor, "B C H W"], survival: Float[Tensor, "B depth 2"] | None = None
    ) -> Float[Tensor, "B classes"]:
        return self.head(self.pool(images, survival))

    def pool(
        self, images: Float[Tensor, "B C H W"], survival: Float[Tensor, "B depth 2"] | None = None
    ) -> Float[Tensor, "B D"]:
        """Return what the head sees."""
        x = self.embed(images)
        for i, block in enumerate(self.blocks):
            x = block(x, None if survival is None else survival[:, i])
        return self.pooled(x)

    def embed(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B tokens D"]:
        """Turn all patches into tokens with positions, the class token in front."""
        x = self.patch_embed(images)
        if self.config.model.class_token:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return x + self.pos_embed

    def pooled(self, x: Float[Tensor, "B tokens D"]) -> Float[Tensor, "B D"]:
        """Pool what the last block returned."""
        if self.config.pooling == "mean":
            return self.fc_norm(x[:, int(self.config.model.class_token) :].mean(dim=1))
        return self.norm(x)[:, 0]


def take(x: Float[Tensor, "B T D"], ids: Int[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
    """Pick the tokens at `ids`, for each example its own."""
    return torch.gather(x, 1, ids[..., None].expand(-1, -1, x.shape[-1]))
