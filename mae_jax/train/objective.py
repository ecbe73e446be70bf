"""What a run minimises, as the step sees it; and the objective of pretraining (He et al. 2021, section 3).

That of fine-tuning and probing is in classification.py.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt, UInt8

from mae_jax import rng
from mae_jax.config import AugmentConfig, OptimConfig, PretrainConfig, wide
from mae_jax.models import Params
from mae_jax.models.mae import MaskedAutoencoder, Output, trained
from mae_jax.models.masking import Noise
from mae_jax.models.patches import Images
from mae_jax.train.optimizers import direction


class Batch(NamedTuple):
    """Images as they come, and the position of each in the stream of all examples."""

    images: UInt8[Array | np.ndarray, "batch height width channels"]
    positions: UInt[Array | np.ndarray, " batch"]
    crops: Float[Array | np.ndarray, "batch 5"] | None = None  # boxes to cut on the device: see crops.py
    labels: Int[Array | np.ndarray, " batch"] | None = None  # where classes are learnt


@runtime_checkable
class Objective(Protocol):
    """A loss over parameters.

    Parameters are a nested dictionary; some are trained, the others stay as they are or are replaced by the loss.
    """

    @property
    def group_size(self) -> int:
        """Return how many neighbouring rows of a batch must stay together where it is cut into parts."""

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


@dataclass(frozen=True)
class Pretraining:
    """The masked autoencoder's own loss; every parameter is trained but the basis of a PCA target."""

    config: PretrainConfig
    group_size: ClassVar[int] = 1

    def init(self) -> Params:
        """Make random parameters, as one program: by itself every operation of the forward pass would be compiled."""
        model = self.config.model
        images = jnp.zeros((1, *model.image_hw, model.in_channels), wide(model.dtype))
        noise = jnp.zeros((1, model.num_patches), jnp.float32)
        init = jax.jit(lambda key: MaskedAutoencoder(model).init(key, images, noise)["params"])
        return init(rng.device_key(self.config.seed, "init"))

    def trained(self, path: tuple[str, ...]) -> bool:
        return trained(path)

    def direction(self, optim: OptimConfig) -> optax.GradientTransformation:
        return direction(optim)

    def rates(self, params: Params) -> None:
        return None

    def inputs(self, batch: Batch, pixels: Array, step: Int[Array, ""]) -> tuple[Images, Noise]:
        """Normalise images, and draw the noise that their masks are made of."""
        config = self.config
        images = normalise_images(pixels, config.augment, wide(config.model.dtype))
        key = rng.device_key(config.seed, "mask")
        return images, rng.example_uniforms(key, batch.positions, config.model.num_patches)

    def loss(self, params: Params, inputs: tuple[Images, Noise]) -> tuple[Float[Array, ""], Params]:
        return reconstruction_loss(MaskedAutoencoder(self.config.model), params, *inputs), {}


def reconstruction_loss(model: MaskedAutoencoder, params: Params, images: Images, noise: Noise) -> Float[Array, ""]:
    """Compute the loss of one batch."""
    return cast(Output, model.apply({"params": params}, images, noise)).loss
