"""What is predicted, and how far off it is (He et al. 2021, section 3 and Table 1d)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from mae_jax.models.patches import Patches

Coefficients = Float[Array, "batch patches components"]
Predicted = Float[Array, "batch patches predicted"]  # pixels of each patch, or principal coefficients

# Inside the root, as in the paper's code; patches of one colour stay finite.
TARGET_EPS = 1e-6


def patch_statistics(patches: Patches) -> tuple[Float[Array, "batch patches 1"], Float[Array, "batch patches 1"]]:
    """Compute mean and deviation of each patch; the variance is unbiased (divided by P - 1)."""
    mean = patches.mean(axis=-1, keepdims=True)
    variance = patches.var(axis=-1, ddof=1, keepdims=True)
    return mean, jnp.sqrt(variance + TARGET_EPS)


def normalise_patches(patches: Patches) -> Patches:
    """Normalise each patch by its own mean and deviation."""
    mean, deviation = patch_statistics(patches)
    return (patches - mean) / deviation


def principal_coefficients(
    patches: Patches, mean: Float[Array, " values"], basis: Float[Array, "values components"]
) -> Coefficients:
    """Compute each patch's coefficients in an orthonormal basis, about the mean."""
    return jnp.matmul(patches - mean, basis, precision="highest")


def from_coefficients(
    coefficients: Coefficients, mean: Float[Array, " values"], basis: Float[Array, "values components"]
) -> Patches:
    """Compute the patches that have these coefficients, and nothing outside the basis."""
    return jnp.matmul(coefficients, basis.T, precision="highest") + mean


def patch_errors(pred: Predicted, target: Predicted) -> Float[Array, "batch patches"]:
    """Compute the squared error, averaged inside each patch."""
    return jnp.square(pred - target).mean(axis=-1)
