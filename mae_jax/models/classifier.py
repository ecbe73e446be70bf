"""The encoder with a linear head, as fine-tuning leaves it (He et al. 2021, section 4 and appendix A.1)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mae_jax.config import ClassifierConfig, wide
from mae_jax.models.layers import Dense, LayerNorm
from mae_jax.models.mae import Encoder, everything_visible


class Classifier(nn.Module):
    """Normalised images to logits; every patch is visible.

    Pooling `mean` takes the mean of the patches and then normalises it (`fc_norm`): the encoder's own LayerNorm is
    not there. Pooling `class` takes the class token behind that LayerNorm.
    """

    config: ClassifierConfig

    def setup(self) -> None:
        config = self.config
        self.encoder = Encoder(config.model)
        if config.pooling == "mean":
            self.fc_norm = LayerNorm(config.model.dtype)
        self.head = Dense(config.classes, config.model.dtype)

    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        """The logits, in float32 or wider."""
        model = self.config.model
        patches, mask = everything_visible(images, model)
        if self.config.pooling == "mean":
            tokens = self.encoder.blocks(patches, mask)
            pooled = self.fc_norm(tokens[:, int(model.class_token) :].mean(axis=1, keepdims=True))[:, 0]
        else:
            pooled = self.encoder(patches, mask)[:, 0]
        return self.head(pooled).astype(jnp.dtype(wide(model.dtype)))
