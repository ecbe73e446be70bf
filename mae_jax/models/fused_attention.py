"""Attention as one kernel of the cuDNN library, on NVIDIA GPUs: softmax weights are never written to memory.

Dao et al. 2022 (FlashAttention). Sums and softmax are in float32 there too; the weights are made anew going backward.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16

Fused = BFloat16[Array, "batch tokens 3 heads head_dim"]
Rows = BFloat16[Array, "batch tokens heads head_dim"]


def fused_attend(fused: Fused, since: int = 0) -> BFloat16[Array, "batch tokens-{since} heads head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v out of one dense layer's query, key and value.

    Queries are the tokens from `since` on, keys and values all of them.
    """
    batch, tokens = fused.shape[:2]
    query, key, value = fused[:, since:, 0], fused[:, :, 1], fused[:, :, 2]
    # JAX 0.10 to 0.12 refuse odd lengths where a gradient is asked for. A key too many is told by the length, and has
    # no weight; a query too many is cut off, so that its gradient is zero.
    lengths = jnp.full(batch, tokens, jnp.int32) if tokens % 2 else None
    mixed = jax.nn.dot_product_attention(
        _even(query), _even(key), _even(value), key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return mixed[:, : tokens - since]


def _even(rows: Rows) -> BFloat16[Array, "batch even heads head_dim"]:
    return jnp.pad(rows, ((0, 0), (0, rows.shape[1] % 2), (0, 0), (0, 0)))
