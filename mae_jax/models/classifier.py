"""The encoder with a linear head, as fine-tuning leaves it (He et al. 2021, section 4 and appendix A.1)."""

import flax.linen as nn
from jaxtyping import Array, Float

from mae_jax.config import ClassifierConfig, wide
from mae_jax.models.blocks import Dense, LayerNorm, drop_path
from mae_jax.models.mae import Encoder, all_visible
from mae_jax.models.patches import Images

Pooled = Float[Array, "batch encoder_width"]


class Classifier(nn.Module):
    """A classifier of normalised images; every patch is visible.

    Pooling `mean` takes the mean of the patches and then normalises it (`fc_norm`): the encoder's own LayerNorm is
    not there. Pooling `class` takes the class token behind that LayerNorm.
    """

    config: ClassifierConfig

    def setup(self) -> None:
        config = self.config
        self.encoder = Encoder(config.model)
        if config.pooling == "mean":
            self.fc_norm = LayerNorm(config.model.dtype)
        # Never below float32, as probing and evaluation compute it, where several heads share an encoder.
        self.head = Dense(config.classes, wide(config.model.dtype))

    def __call__(
        self,
        images: Images,
        uniforms: Float[Array, "batch depth 2"] | None = None,
    ) -> Float[Array, "batch classes"]:
        """Compute the logits, in float32 or wider; with uniforms in [0, 1), drop branches at the configured rate."""
        return self.head(self.pool(images, uniforms))

    def pool(
        self,
        images: Images,
        uniforms: Float[Array, "batch depth 2"] | None = None,
    ) -> Pooled:
        """Compute the features that the head classifies."""
        config = self.config
        patches, mask = all_visible(images, config.model)
        survival = None if uniforms is None else drop_path(uniforms, config.drop_path)
        # Blocks without the LayerNorm behind them: which one follows depends on the pooling.
        tokens = self.encoder.blocks(patches, mask, survival)
        if config.pooling == "class":
            return self.encoder.norm(tokens)[:, 0]
        return self.fc_norm(tokens[:, int(config.model.class_token) :].mean(axis=1, keepdims=True))[:, 0]
