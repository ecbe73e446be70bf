"""Gradients of a batch that is too large to be computed at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def mean_of_parts(function: Callable[[Any], Any], inputs: Any, count: int) -> Any:
    """The mean of what `function` makes of `count` equal parts of the inputs, one after another.

    A part takes every `count`-th row: where the rows are cut over devices, it has as many of each device.
    """
    if count == 1:
        return function(inputs)
    parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), inputs)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts)))
    total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, function(part)), None), zeros, parts)
    return jax.tree.map(lambda x: x / count, total)
