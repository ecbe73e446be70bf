"""What is predicted, and how far off it is (He et al. 2021, section 3 and Table 1d)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

Patches = Float[Array, "batch patches values"]

# Inside the root, as in the paper's code; patches of one colour stay finite.
TARGET_EPS = 1e-6


def patch_statistics(patches: Patches) -> tuple[Float[Array, "batch patches 1"], Float[Array, "batch patches 1"]]:
    """Mean and deviation of each patch; the variance is unbiased (divided by P - 1)."""
    mean = patches.mean(axis=-1, keepdims=True)
    variance = patches.var(axis=-1, ddof=1, keepdims=True)
    return mean, jnp.sqrt(variance + TARGET_EPS)


def normalise_patches(patches: Patches) -> Patches:
    """Each patch by its own mean and deviation."""
    mean, deviation = patch_statistics(patches)
    return (patches - mean) / deviation


def patch_errors(pred: Patches, target: Patches) -> Float[Array, "batch patches"]:
    """Squared error, averaged inside each patch."""
    return jnp.square(pred - target).mean(axis=-1)
