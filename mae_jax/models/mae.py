"""The masked autoencoder: an encoder that sees the visible patches, a light decoder that predicts the hidden ones.

He et al. 2021, section 3. Two steps stand in another order than in the paper, with the same result:

- Visible patches are picked from the pixels, before the projection: it runs on a quarter of them.
- The decoder does not unshuffle its tokens. Attention is blind to their order, of which positions alone inform it. So
  the decoder works on [visible, hidden] with the rows of its position table shuffled alike. The hidden patches are
  then a slice, and no activation is ever gathered or scattered. The last block, from its queries on, and all that
  follows run on that slice alone.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mae_jax.config import ModelConfig, wide
from mae_jax.models.blocks import Dense, LayerNorm, Tokens, block_class
from mae_jax.models.masking import Ids, Mask, Noise, make_mask
from mae_jax.models.patches import Images, Patches, fixed_positions, patchify

Coefficients = Float[Array, "batch patches components"]
Predicted = Float[Array, "batch patches predicted"]  # pixels of each patch, or principal coefficients

# What the encoder gives the decoder, which has more tokens of another width.
Latent = Float[Array, "batch seen encoder_width"]

# Inside the root, as in the paper's code; patches of one colour stay finite.
TARGET_EPS = 1e-6

token_init = nn.initializers.normal(0.02)


class Output(NamedTuple):
    """What the model computes; a compiled function leaves out what is not used.

    latent: the encoder's tokens, class token first, then the visible patches in the order of ids_shuffle
      (all patches in image order where the encoder sees mask tokens).
    pred, target, mask: every patch, in image order; mask is 1 where a patch was hidden.
    """

    loss: Float[Array, ""]
    pred: Predicted
    target: Predicted
    mask: Float[Array, "batch patches"]
    ids_restore: Ids
    latent: Tokens


def pick(rows: Float[Array, "batch rows values"], ids: Int[Array, "batch ids"]) -> Float[Array, "batch ids values"]:
    """Pick rows of each example by its ids."""
    return jnp.take_along_axis(rows, ids[..., None], axis=1, mode="promise_in_bounds")


def trained(path: tuple[str, ...]) -> bool:
    """Return whether the parameter of this path is trained: all are, but the basis of a PCA target."""
    return path[0] != "target"


def uniform_bias(fan_in: int) -> nn.initializers.Initializer:
    """Draw a bias from U(-fan_in^-1/2, fan_in^-1/2), PyTorch's default, which the authors leave on the projection."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init


def positions(module: nn.Module, config: ModelConfig, width: int) -> Float[Array, "tokens width"]:
    """Make the position table of an encoder or decoder; a learned one is its parameter `pos_embed`."""
    dtype = wide(config.dtype)
    if config.positions == "learned":
        shape = (1, config.num_patches + config.class_token, width)
        return module.param("pos_embed", token_init, shape, dtype)[0]
    return jnp.asarray(fixed_positions(config.positions, width, config.grid, config.class_token), dtype)


class Encoder(nn.Module):
    """The encoder: patch projection and positions, blocks, LayerNorm."""

    config: ModelConfig

    def setup(self) -> None:
        config, stack = self.config, self.config.encoder
        self.patch_embed = Dense(stack.width, config.dtype, bias_init=uniform_bias(config.patch_dim))
        if config.class_token:
            self.cls_token = self.param("cls_token", token_init, (1, 1, stack.width), wide(config.dtype))
        if config.encoder_mask_tokens:
            self.mask_token = self.param("mask_token", token_init, (1, 1, stack.width), wide(config.dtype))
        self.position_table = positions(self, config, stack.width)
        self.block = [block_class(config.remat)(stack, config.dtype, config.attention) for _ in range(stack.depth)]
        self.norm = LayerNorm(config.dtype)

    def embed(self, visible: Patches, mask: Mask) -> Tokens:
        """Turn visible patches into tokens with positions, in the order of ids_shuffle, the class token in front."""
        config = self.config
        tokens = self.patch_embed(visible).astype(wide(config.dtype))
        if config.encoder_mask_tokens:
            tokens = append_token(tokens, self.mask_token, config.num_patches)
        return with_positions(tokens, self.position_table, mask, self.cls_token if config.class_token else None)

    def blocks(
        self,
        visible: Patches,
        mask: Mask,
        survival: Float[Array, "batch depth 2"] | None = None,
        count: int | None = None,
    ) -> Tokens:
        """Compute the tokens after the last block, or after the first `count` blocks, not yet normalised.

        `survival` is what `drop_path` gives.
        """
        x = self.embed(visible, mask)
        for number, block in enumerate(self.block[:count]):
            x = block(x, 0, None if survival is None else survival[:, number])
        return x

    def __call__(self, visible: Patches, mask: Mask) -> Tokens:
        return self.norm(self.blocks(visible, mask))


class Decoder(nn.Module):
    """The decoder: projection to its own width, mask tokens for hidden patches, blocks, LayerNorm, prediction."""

    config: ModelConfig

    def setup(self) -> None:
        config, stack = self.config, self.config.decoder
        self.embed_latent = Dense(stack.width, config.dtype, name="embed")
        if not config.encoder_mask_tokens:
            self.mask_token = self.param("mask_token", token_init, (1, 1, stack.width), wide(config.dtype))
        self.position_table = positions(self, config, stack.width)
        self.block = [block_class(config.remat)(stack, config.dtype, config.attention) for _ in range(stack.depth)]
        self.norm = LayerNorm(config.dtype)
        self.pred = Dense(config.target_dim, config.dtype)

    def embed(self, latent: Latent, mask: Mask) -> Tokens:
        """Join the encoder's tokens and mask tokens, with positions, in the order of ids_shuffle, class token first."""
        config = self.config
        tokens = self.embed_latent(latent).astype(wide(config.dtype))
        first = tokens[:, :1] if config.class_token else None
        tokens = tokens[:, int(config.class_token) :]
        if not config.encoder_mask_tokens:
            tokens = append_token(tokens, self.mask_token, config.num_patches)
        return with_positions(tokens, self.position_table, mask, first)

    def __call__(self, latent: Latent, mask: Mask) -> Tokens:
        """Compute all tokens before the last block, in the order of ids_shuffle, the class token in front."""
        x = self.embed(latent, mask)
        for block in self.block[:-1]:
            x = block(x, 0)
        return x

    def predict(self, tokens: Tokens, start: int = 0) -> Predicted:
        """Run the last block and predict the patches from `start` on, in the order of ids_shuffle."""
        return self.pixels(self.block[-1](tokens, start + int(self.config.class_token)))

    def pixels(self, tokens: Tokens) -> Predicted:
        """Predict pixels, or whatever else is the target, from the tokens after the last block."""
        return self.pred(self.norm(tokens)).astype(wide(self.config.dtype))


def append_token(
    tokens: Float[Array, "batch count width"], token: Float[Array, "1 1 width"], length: int
) -> Float[Array, "batch {length} width"]:
    """Fill a sequence up to `length` with one token."""
    batch, count, width = tokens.shape
    return jnp.concatenate([tokens, jnp.broadcast_to(token, (batch, length - count, width))], axis=1)


def with_positions(
    tokens: Float[Array, "batch count width"],
    table: Float[Array, "rows width"],
    mask: Mask,
    first: Float[Array, "_ 1 width"] | None,
) -> Tokens:
    """Add each patch's row of the table; put the class token, with its own row, in front if there is one."""
    # Tokens are shuffled and the table is not: each token takes the row of its patch. In the encoder there are fewer
    # tokens than patches, which are the first of ids_shuffle.
    patch_rows = table if first is None else table[1:]
    tokens = tokens + patch_rows[mask.ids_shuffle[:, : tokens.shape[1]]]
    if first is None:
        return tokens
    first = jnp.broadcast_to(first + table[0], (tokens.shape[0], 1, tokens.shape[2]))
    return jnp.concatenate([first, tokens], axis=1)


def all_visible(images: Images, config: ModelConfig) -> tuple[Patches, Mask]:
    """Cut images into patches in image order, and make the mask that hides none of them."""
    patches = patchify(images.astype(wide(config.dtype)), config.patch_hw)
    ids = jnp.broadcast_to(jnp.arange(patches.shape[1]), patches.shape[:2])
    return patches, Mask(ids, ids, jnp.zeros(ids.shape))


class PrincipalComponents(nn.Module):
    """The principal coefficients of patches, as a target (He et al. 2021, Table 1d).

    Mean and basis are parameters that are not trained. `init` makes them nan, and with them each loss, until they are
    fitted to the patches of the data (mae_jax/runs/target.py).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, patches: Patches) -> Coefficients:
        config, unfitted = self.config, nn.initializers.constant(jnp.nan)
        assert config.pca_components is not None
        mean = self.param("mean", unfitted, (config.patch_dim,), wide(config.dtype))
        basis = self.param("basis", unfitted, (config.patch_dim, config.pca_components), wide(config.dtype))
        return principal_coefficients(patches, jax.lax.stop_gradient(mean), jax.lax.stop_gradient(basis))


class MaskedAutoencoder(nn.Module):
    """The masked autoencoder: from images and mask noise to a loss and all that led to it.

    `model.init(key, images, noise)["params"]`, then `model.apply({"params": params}, images, noise)`.
    """

    config: ModelConfig

    def setup(self) -> None:
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        if self.config.pca_components is not None:
            self.components = PrincipalComponents(self.config, name="target")

    def __call__(self, images: Images, noise: Noise) -> Output:
        """Compute `Output` from normalised images, and noise of one row of L values an example.

        Raises:
          ValueError: images or noise do not have the shape of the configuration.
        """
        config = self.config
        expected = (*config.image_hw, config.in_channels), (config.num_patches,)
        if (images.shape[1:], noise.shape[1:]) != expected:
            raise ValueError(
                f"images {images.shape} and noise {noise.shape} do not fit the configuration: "
                f"a batch of {expected[0]} and of {expected[1]}"
            )
        # Image to visible patches. From here to the loss everything is in the order of ids_shuffle, visible ones first.
        patches = patchify(images.astype(wide(config.dtype)), config.patch_hw)
        mask = make_mask(noise, config)
        shuffled = pick(patches, mask.ids_shuffle)
        latent = self.encoder(shuffled[:, : config.keep], mask)
        decoded = self.decoder(latent, mask)

        # A compiled training step asks for the loss alone: then the prediction of all patches is not computed, and the
        # last block runs on the hidden ones. Operation by operation everything is computed, and once is enough.
        start = config.keep if config.loss_on == "hidden" else 0
        traced = isinstance(decoded, jax.core.Tracer)
        scored = self.decoder.predict(decoded, start) if start and traced else None
        pred = self.decoder.predict(decoded)
        if scored is None:
            scored = pred[:, start:]
        return Output(
            loss=patch_errors(scored, self.target(shuffled[:, start:])).mean(),
            pred=pick(pred, mask.ids_restore),
            target=self.target(patches),
            mask=mask.hidden,
            ids_restore=mask.ids_restore,
            latent=self.in_image_order(latent, mask) if config.encoder_mask_tokens else latent,
        )

    def encode(self, images: Images) -> Float[Array, "batch tokens encoder_width"]:
        """Encode images with every patch visible: class token first, then the patches in image order."""
        return self.encoder(*all_visible(images, self.config))

    def target(self, patches: Patches) -> Predicted:
        """Compute what is to be predicted: pixels, normalised inside each patch or not, or principal coefficients."""
        if self.config.pca_components is not None:
            return self.components(patches)
        return normalise_patches(patches) if self.config.norm_pix_loss else patches

    def in_image_order(self, tokens: Tokens, mask: Mask) -> Tokens:
        """Unshuffle the tokens of all patches, the class token left in front."""
        first = int(self.config.class_token)
        return jnp.concatenate([tokens[:, :first], pick(tokens[:, first:], mask.ids_restore)], axis=1)


# --- What is predicted, and how far off it is (section 3 and Table 1d) ---


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
