"""What the device multiplies at its best: one large product, timed. A step's FLOP/s are a share of it."""

import time

import jax
import jax.numpy as jnp

from mae_jax.bench.table import MatrixRate

# Factors are square. On a CPU the larger one would take minutes, and gains nothing.
SIZE, CPU_SIZE = 8192, 1024
SECONDS = 1.0  # of products at least, since a moment in which a machine is busy elsewhere is not its rate


def matrix_rate(dtype: str, repeats: int = 10) -> MatrixRate:
    """The best of `repeats` or more products of square matrices of `dtype`, each waited for, after two untimed."""
    size = CPU_SIZE if jax.devices()[0].platform == "cpu" else SIZE
    left, right = (jax.random.normal(jax.random.key(seed), (size, size), dtype) for seed in (0, 1))
    product = jax.jit(jnp.matmul)
    for _ in range(2):
        product(left, right).block_until_ready()
    seconds: list[float] = []
    while len(seconds) < repeats or sum(seconds) < SECONDS:
        began = time.perf_counter()
        product(left, right).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return MatrixRate(2 * size**3 / min(seconds), size, dtype)
