"""The transformer block (Vaswani et al. 2017, pre-norm as Dosovitskiy et al. 2020).

Matrix products run in `dtype`. The residual stream, LayerNorm, softmax and parameters stay in
`wide(dtype)`: float32, or float64 where that is asked for.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mae_jax.config import Dtype, TransformerConfig, wide
from mae_jax.models.gradients import attend, gelu, product, split_heads

Tokens = Float[Array, "batch tokens width"]

LAYER_NORM_EPS = 1e-6


def dense(
    features: int,
    dtype: Dtype,
    name: str | None = None,
    bias_init: nn.initializers.Initializer = nn.initializers.zeros,
) -> nn.Dense:
    """A dense layer, its kernel xavier uniform (He et al. 2021, appendix A.1)."""
    return nn.Dense(
        features,
        dtype=dtype,
        param_dtype=wide(dtype),
        kernel_init=nn.initializers.xavier_uniform(),
        bias_init=bias_init,
        dot_general=lambda x, kernel, *_, **__: product(x, kernel),
        name=name,
    )


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
    """Multi-head self-attention; query, key and value come fused, in this order, with bias."""

    heads: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        batch, tokens, width = x.shape
        fused = dense(3 * width, self.dtype, name="qkv")(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        mixed = attend(*split_heads(fused), self.dtype)
        return dense(width, self.dtype, name="proj")(mixed.transpose(0, 2, 1, 3).reshape(x.shape))


class Mlp(nn.Module):
    """Two dense layers with a GELU between."""

    hidden: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        hidden = dense(self.hidden, self.dtype, name="fc1")(x)
        return dense(x.shape[-1], self.dtype, name="fc2")(gelu(hidden))


class Block(nn.Module):
    """x + attention(LayerNorm(x)), then x + mlp(LayerNorm(x))."""

    config: TransformerConfig
    dtype: Dtype

    def setup(self) -> None:
        self.norm1 = LayerNorm(self.dtype)
        self.attn = Attention(self.config.heads, self.dtype)
        self.norm2 = LayerNorm(self.dtype)
        self.mlp = Mlp(self.config.mlp_width, self.dtype)

    def __call__(self, x: Tokens) -> Tokens:
        x = x + self.attn(self.norm1(x)).astype(x.dtype)
        return x + self.mlp(self.norm2(x)).astype(x.dtype)


def block_class(remat: bool) -> type[Block]:
    """The block, or the block that is recomputed in the backward pass."""
    return nn.remat(Block) if remat else Block
