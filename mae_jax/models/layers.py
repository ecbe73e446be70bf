"""The transformer block (Vaswani et al. 2017, pre-norm as Dosovitskiy et al. 2020).

Matrix products run in `dtype`. The residual stream, LayerNorm, softmax and parameters stay in
`wide(dtype)`: float32, or float64 where that is asked for.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mae_jax.config import Dtype, TransformerConfig, wide
from mae_jax.models.gradients import affine, attend, gelu, split_heads

Tokens = Float[Array, "batch tokens width"]

LAYER_NORM_EPS = 1e-6


class Dense(nn.Module):
    """x kernel + bias, the kernel xavier uniform at first (He et al. 2021, appendix A.1)."""

    features: int
    dtype: Dtype
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch {self.features}"]:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), shape, wide(self.dtype))
        bias = self.param("bias", self.bias_init, shape[1:], wide(self.dtype))
        return affine(x.astype(self.dtype), kernel, bias, self.dtype)


class LayerNorm(nn.Module):
    """Normalises each token; statistics in at least float32, the variance in two passes."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), wide(self.dtype))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), wide(self.dtype))
        x = x.astype(wide(self.dtype))
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + LAYER_NORM_EPS) * scale + bias


class Attention(nn.Module):
    """Multi-head self-attention; query, key and value come fused, in this order, with bias.

    Queries are the tokens from `since` on, keys and values all of them.
    """

    heads: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Tokens, since: int = 0) -> Float[Array, "batch tokens-{since} width"]:
        batch, tokens, width = x.shape
        fused = Dense(3 * width, self.dtype, name="qkv")(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = split_heads(fused)
        mixed = attend(query[:, :, since:], key, value, self.dtype)
        return Dense(width, self.dtype, name="proj")(mixed.transpose(0, 2, 1, 3).reshape(batch, tokens - since, width))


class Mlp(nn.Module):
    """Two dense layers with a GELU between."""

    hidden: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        hidden = Dense(self.hidden, self.dtype, name="fc1")(x)
        return Dense(x.shape[-1], self.dtype, name="fc2")(gelu(hidden))


class Block(nn.Module):
    """x + attention(LayerNorm(x)), then x + mlp(LayerNorm(x)), of the tokens from `since` on."""

    config: TransformerConfig
    dtype: Dtype

    def setup(self) -> None:
        self.norm1 = LayerNorm(self.dtype)
        self.attn = Attention(self.config.heads, self.dtype)
        self.norm2 = LayerNorm(self.dtype)
        self.mlp = Mlp(self.config.mlp_width, self.dtype)

    def __call__(self, x: Tokens, since: int = 0) -> Float[Array, "batch tokens-{since} width"]:
        x = x[:, since:] + self.attn(self.norm1(x), since).astype(x.dtype)
        return x + self.mlp(self.norm2(x)).astype(x.dtype)


def block_class(remat: bool) -> type[Block]:
    """The block, or the block that is recomputed in the backward pass; that one must be told `since`, by position."""
    return nn.remat(Block, static_argnums=(2,)) if remat else Block
