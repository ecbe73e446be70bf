"""The transformer block (Vaswani et al. 2017, pre-norm as Dosovitskiy et al. 2020).

Matrix products run in `dtype`. The residual stream, LayerNorm, softmax and parameters stay in
`wide(dtype)`: float32, or float64 where that is asked for.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mae_jax.config import Dtype, TransformerConfig

Tokens = Float[Array, "batch tokens width"]

LAYER_NORM_EPS = 1e-6


def wide(dtype: Dtype) -> Dtype:
    """The dtype of everything but matrix products."""
    return "float64" if dtype == "float64" else "float32"


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


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(
    left: Float[Array, "batch heads rows inner"], right: Float[Array, "batch heads inner columns"], dtype: Dtype
) -> Float[Array, "batch heads rows columns"]:
    """A matrix product of factors in `dtype`, given in `wide(dtype)`.

    Its gradient comes in `wide(dtype)` and is rounded to `dtype`: JAX would multiply it as it is, in float32 where
    bfloat16 is asked for.
    """
    return jnp.matmul(left, right, preferred_element_type=wide(dtype))


def _product_forward(left: Array, right: Array, dtype: Dtype) -> tuple[Array, tuple[Array, Array]]:
    return product(left, right, dtype), (left, right)


def _product_backward(dtype: Dtype, factors: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    return jax.vjp(jnp.matmul, *factors)[1](gradient.astype(dtype))


product.defvjp(_product_forward, _product_backward)


def attend(
    query: Float[Array, "batch heads tokens head_dim"],
    key: Float[Array, "batch heads tokens head_dim"],
    value: Float[Array, "batch heads tokens head_dim"],
    dtype: Dtype,
) -> Float[Array, "batch heads tokens head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v, divided by the softmax's sum after the second product.

    The rows of weights are as long as the sequence, the rows of the result only as long as a head:
    dividing those is less work, and equal in exact arithmetic.
    """
    scores = product(query * query.shape[-1] ** -0.5, key.mT, dtype)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    mixed = product(weights.astype(dtype), value, dtype)
    return (mixed / weights.sum(axis=-1, keepdims=True)).astype(dtype)


class Attention(nn.Module):
    """Multi-head self-attention; query, key and value come fused, in this order, with bias."""

    heads: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        batch, tokens, width = x.shape
        fused = dense(3 * width, self.dtype, name="qkv")(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = fused.transpose(2, 0, 3, 1, 4)
        mixed = attend(query, key, value, self.dtype)
        return dense(width, self.dtype, name="proj")(mixed.transpose(0, 2, 1, 3).reshape(x.shape))


def gelu(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """The exact form, with erf (Hendrycks and Gimpel 2016), not the tanh approximation."""
    return 0.5 * x * (1 + jax.lax.erf(x * 2**-0.5))


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
