"""Operations whose gradient is written out, since automatic differentiation is right, but slower or less exact.

- Products: differentiated, they contract two axes at once, and the compiler copies an activation transposed for each.
- Attention: in bfloat16, differentiation multiplies float32 gradients as they come; in any dtype it keeps more.
- GELU: the gradient needs the input alone, differentiation keeps two more arrays of its size.

`scripts/bench_notes.md` has the gain of each.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mae_jax.config import Dtype, wide

Queries = Float[Array, "batch heads queries head_dim"]
Heads = Float[Array, "batch heads tokens head_dim"]
Fused = Float[Array, "batch tokens 3 heads head_dim"]  # query, key and value as one dense layer gives them


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def affine(
    x: Float[Array, "*batch inputs"],
    kernel: Float[Array, "inputs outputs"],
    bias: Float[Array, " outputs"],
    dtype: Dtype,
) -> Float[Array, "*batch outputs"]:
    """Compute x kernel + bias as one product of all rows, in `dtype`; kernel, bias, their gradients: `wide(dtype)`."""
    return (_rows(x) @ kernel.astype(dtype) + bias.astype(dtype)).reshape(*x.shape[:-1], kernel.shape[1])


def _affine_forward(x: Array, kernel: Array, bias: Array, dtype: Dtype) -> tuple[Array, tuple[Array, Array]]:
    return affine(x, kernel, bias, dtype), (x, kernel)


def _affine_backward(dtype: Dtype, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
    x, kernel = saved
    gradient = _rows(gradient)
    # Of x, kernel and bias. Sums over rows are long, so those of kernel and bias are accumulated in the wide dtype.
    return (
        (gradient @ kernel.astype(dtype).T).reshape(x.shape),
        jnp.matmul(_rows(x).T, gradient, preferred_element_type=wide(dtype)),
        gradient.astype(wide(dtype)).sum(axis=0),
    )


affine.defvjp(_affine_forward, _affine_backward)


def _rows(x: Float[Array, "*batch width"]) -> Float[Array, "rows width"]:
    """Join all axes but the last."""
    return x.reshape(-1, x.shape[-1])


@jax.custom_vjp
def split_heads(fused: Fused) -> tuple[Heads, Heads, Heads]:
    """Split one dense layer's result into query, key and value."""
    query, key, value = fused.transpose(2, 0, 3, 1, 4)
    return query, key, value


def _split_heads_forward(fused: Array) -> tuple[tuple[Array, Array, Array], None]:
    return split_heads(fused), None


def _split_heads_backward(_: None, gradients: tuple[Array, Array, Array]) -> tuple[Array]:
    # One pass that joins the three: differentiation would pad each with zeros and add them.
    return (jnp.stack([gradient.transpose(0, 2, 1, 3) for gradient in gradients], axis=2),)


split_heads.defvjp(_split_heads_forward, _split_heads_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(query: Queries, key: Heads, value: Heads, dtype: Dtype) -> Queries:
    """Compute softmax(q k^T / sqrt(head_dim)) v, dividing by the softmax's sum after the second product.

    The rows of weights are as long as the sequence, the rows of the result only as long as a head:
    dividing those is less work, and equal in exact arithmetic. The gradient is divided likewise.
    Every product has its factors in `dtype`, backward too; the rest is in `wide(dtype)`.
    """
    return _attend_forward(query, key, value, dtype)[0]


def _attend_forward(query: Array, key: Array, value: Array, dtype: Dtype) -> tuple[Array, tuple[Array, ...]]:
    scores = jnp.matmul(query * query.shape[-1] ** -0.5, key.mT, preferred_element_type=wide(dtype))
    # Less the row's largest score, which changes no ratio: the exponential cannot overflow.
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(dtype)
    mixed = (jnp.matmul(weights, value, preferred_element_type=wide(dtype)) / total).astype(dtype)
    return mixed, (query, key, value, weights, total, mixed)


def _attend_backward(dtype: Dtype, saved: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
    query, key, value, weights, total, mixed = saved
    scale = query.shape[-1] ** -0.5
    # With w the weights before division, s their sum, o = w v / s the result and g its gradient:
    #   dv = w^T (g / s),   dw = (g / s) v^T - (g . o) / s,   dscores = w * dw,
    # where g . o is one number a row: what the division by s takes from every weight of it.
    gradient = gradient.astype(wide(dtype)) / total
    along = (gradient * mixed.astype(wide(dtype))).sum(axis=-1, keepdims=True)
    gradient = gradient.astype(dtype)
    to_weights = jnp.matmul(gradient, value.mT, preferred_element_type=wide(dtype))
    to_scores = (weights.astype(wide(dtype)) * (to_weights - along)).astype(dtype)
    return jnp.matmul(to_scores, key) * scale, jnp.matmul(to_scores.mT, query * scale), jnp.matmul(weights.mT, gradient)


attend.defvjp(_attend_forward, _attend_backward)


@jax.custom_vjp
def gelu(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Compute the exact GELU, with erf (Hendrycks and Gimpel 2016), not its tanh approximation."""
    return x * _normal_cdf(x)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return gelu(x), x


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    # (x Phi(x))' = Phi(x) + x phi(x), with the normal distribution's Phi and density phi.
    density = jnp.exp(-0.5 * x * x) * (2 * jnp.pi) ** -0.5
    return (gradient * (_normal_cdf(x) + x * density),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1 + jax.lax.erf(x * 2**-0.5))
