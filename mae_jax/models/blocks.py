"""The transformer block (Vaswani et al. 2017, pre-norm as Dosovitskiy et al. 2020).

Matrix products run in `dtype`. The residual stream, LayerNorm, softmax and parameters stay in
`wide(dtype)`: float32, or float64 where that is asked for.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float

from mae_jax.config import AttentionKernel, Dtype, TransformerConfig, wide
from mae_jax.models.gradients import affine, attend, gelu, split_heads

Tokens = Float[Array, "batch tokens width"]
Survival = Float[Array, "batch 2"]  # what the two branches of a block are multiplied by, example by example
Rows = BFloat16[Array, "batch tokens heads head_dim"]

LAYER_NORM_EPS = 1e-6


class Dense(nn.Module):
    """A dense layer, x kernel + bias, whose kernel starts xavier uniform (He et al. 2021, appendix A.1)."""

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
    """A LayerNorm of each token; statistics in at least float32, the variance in two passes."""

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
    """Multi-head self-attention; one dense layer gives query, key and value, in this order, with bias.

    Queries are the tokens from `start` on, keys and values all of them.
    """

    heads: int
    dtype: Dtype
    attention: AttentionKernel = "xla"

    @nn.compact
    def __call__(self, x: Tokens, start: int = 0) -> Float[Array, "batch tokens-{start} width"]:
        batch, tokens, width = x.shape
        fused = Dense(3 * width, self.dtype, name="qkv")(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        # Both kernels take the same layer's result, so parameters do not depend on which of them computes.
        if self.attention == "cudnn":
            mixed = fused_attend(fused, start)
        else:
            query, key, value = split_heads(fused)
            mixed = attend(query[:, :, start:], key, value, self.dtype).transpose(0, 2, 1, 3)
        return Dense(width, self.dtype, name="proj")(mixed.reshape(batch, tokens - start, width))


def fused_attend(
    fused: BFloat16[Array, "batch tokens 3 heads head_dim"], start: int = 0
) -> BFloat16[Array, "batch tokens-{start} heads head_dim"]:
    """Compute softmax(q k^T / sqrt(head_dim)) v with cuDNN, from one dense layer's query, key and value.

    Queries are the tokens from `start` on, keys and values all of them.
    """
    batch, tokens = fused.shape[:2]
    query, key, value = fused[:, start:, 0], fused[:, :, 1], fused[:, :, 2]
    # JAX 0.10 to 0.12 refuse sequences of odd length where a gradient is asked for, so each is filled up with one row
    # of zeros. The lengths mark a key too many as padding, which gives it no weight; the result of a query too many is
    # cut off, which makes its gradient zero.
    lengths = jnp.full(batch, tokens, jnp.int32) if tokens % 2 else None
    mixed = jax.nn.dot_product_attention(
        _even(query), _even(key), _even(value), key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return mixed[:, : tokens - start]


def _even(rows: Rows) -> BFloat16[Array, "batch even heads head_dim"]:
    """Fill a sequence up to an even number of tokens."""
    return jnp.pad(rows, ((0, 0), (0, rows.shape[1] % 2), (0, 0), (0, 0)))


class Mlp(nn.Module):
    """Two dense layers with a GELU between."""

    hidden: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        hidden = Dense(self.hidden, self.dtype, name="fc1")(x)
        return Dense(x.shape[-1], self.dtype, name="fc2")(gelu(hidden))


class Block(nn.Module):
    """A transformer block: x + attention(LayerNorm(x)), then x + mlp(LayerNorm(x)), of the tokens from `start` on.

    With `survival` each branch is multiplied by its own column before it is added (drop path).
    """

    config: TransformerConfig
    dtype: Dtype
    attention: AttentionKernel = "xla"

    def setup(self) -> None:
        self.norm1 = LayerNorm(self.dtype)
        self.attn = Attention(self.config.heads, self.dtype, self.attention)
        self.norm2 = LayerNorm(self.dtype)
        self.mlp = Mlp(self.config.mlp_width, self.dtype)

    def __call__(
        self, x: Tokens, start: int = 0, survival: Survival | None = None
    ) -> Float[Array, "batch tokens-{start} width"]:
        # Attention reads every token. Tokens before `start` are only read, so nothing that follows is computed of them.
        x = x[:, start:] + _surviving(self.attn(self.norm1(x), start).astype(x.dtype), survival, 0)
        return x + _surviving(self.mlp(self.norm2(x)).astype(x.dtype), survival, 1)


def _surviving(branch: Tokens, survival: Survival | None, column: int) -> Tokens:
    """Multiply a branch by its column of `survival`, if branches are dropped at all."""
    return branch if survival is None else branch * survival[:, column, None, None].astype(branch.dtype)


def drop_path(uniforms: Float[Array, "batch depth 2"], rate: float) -> Float[Array, "batch depth 2"]:
    """Draw what each block's branches are multiplied by: 0 for a dropped one, else 1 / (its chance to stay).

    The chance to be dropped rises with depth in equal steps from 0 to `rate` (Huang et al. 2016, section 3). The
    expectation is 1, so that evaluation simply leaves the factors out.
    """
    stays = 1 - rate * jnp.linspace(0, 1, uniforms.shape[1], dtype=uniforms.dtype)[:, None]
    return jnp.where(uniforms < stays, 1 / stays, 0)


@functools.cache
def block_class(remat: bool) -> type[Block]:
    """Return the class of the blocks: `Block`, or with `remat` one that is recomputed in the backward pass.

    Either takes `start` by position. Each is a compiled function within the compiled step: JAX then traces blocks of
    one shape once, however many there are. A test that replaces something inside a block must clear this cache.
    """
    return nn.jit(nn.remat(Block, static_argnums=(2,)) if remat else Block, static_argnums=(2,))
