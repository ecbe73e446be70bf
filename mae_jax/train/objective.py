"""What a run minimises, as the step sees it."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt, UInt8

from mae_jax.config import AugmentConfig, OptimConfig
from mae_jax.models import Params
from mae_jax.models.patches import Images


class Batch(NamedTuple):
    """Images as they come, and the position of each in the stream of all examples."""

    images: UInt8[Array | np.ndarray, "batch height width channels"]
    positions: UInt[Array | np.ndarray, " batch"]
    crops: Float[Array | np.ndarray, "batch 5"] | None = None  # to be cut from the images here: see train/crops.py
    labels: Int[Array | np.ndarray, " batch"] | None = None  # where classes are learnt


@runtime_checkable
class Objective(Protocol):
    """A loss over parameters.

    Parameters are a nested dictionary; some are trained, the others stay as they are or are replaced by the loss.
    """

    @property
    def together(self) -> int:
        """How many neighbouring rows of a batch must stay together where it is cut into parts."""

    def init(self) -> Params:
        """Make the parameters before the first step, from the configuration and its seed alone."""

    def trained(self, path: tuple[str, ...]) -> bool:
        """Return whether the parameter of this path is trained."""

    def direction(self, optim: OptimConfig) -> optax.GradientTransformation:
        """Make the optimizer of the trained parameters, before the learning rate."""

    def rates(self, params: Params) -> Params | None:
        """Return what the learning rate of each trained parameter is multiplied by; None: nothing."""

    def inputs(self, batch: Batch, pixels: UInt8[Array, "batch height width channels"], step: Int[Array, ""]) -> Any:
        """Make the arrays that the loss is computed of, each with a row an example, all randomness drawn."""

    def loss(self, params: Params, inputs: Any) -> tuple[Float[Array, ""], Params]:
        """Return the mean loss of the examples, and the untrained parameters that it replaces ({}: none)."""


def normalise_images(
    images: UInt8[Array | np.ndarray, "batch height width channels"], augment: AugmentConfig, dtype: str
) -> Images:
    """Scale bytes to 0 .. 1, then normalise each channel: (x - mean) / std."""
    mean, std = (jnp.asarray(values, dtype) for values in (augment.mean, augment.std))
    return (jnp.asarray(images, dtype) / 255 - mean) / std
