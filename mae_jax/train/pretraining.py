"""The objective of pretraining: pixels of hidden patches (He et al. 2021, section 3)."""

from dataclasses import dataclass
from typing import ClassVar, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mae_jax import rng
from mae_jax.config import OptimConfig, PretrainConfig, wide
from mae_jax.models import Params
from mae_jax.models.mae import MaskedAutoencoder, Output, trained
from mae_jax.models.masking import Noise
from mae_jax.models.patches import Images
from mae_jax.train.objective import Batch, normalise_images
from mae_jax.train.optimizers import direction


@dataclass(frozen=True)
class Pretraining:
    """The masked autoencoder's own loss; every parameter is trained but the basis of a PCA target."""

    config: PretrainConfig
    together: ClassVar[int] = 1

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
