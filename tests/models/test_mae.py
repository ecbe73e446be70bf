"""The masked autoencoder for every choice that a configuration offers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.config import ModelConfig, TransformerConfig
from mae_jax.models.mae import MaskedAutoencoder
from mae_jax.models.masking import make_mask
from mae_jax.models.patches import patchify

PLAIN = ModelConfig(
    image_size=(8, 12),
    patch_size=(4, 2),
    encoder=TransformerConfig(width=16, depth=2, heads=2, mlp_ratio=2.0),
    decoder=TransformerConfig(width=12, depth=1, heads=3, mlp_ratio=2.0),
    mask_ratio=0.6,
)
CHANGES = {
    "plain": {},
    "no class token": {"class_token": False},
    "sincos1d": {"positions": "sincos1d"},
    "learned": {"positions": "learned"},
    "learned, no class token": {"positions": "learned", "class_token": False},
    "block": {"masking": "block"},
    "grid": {"masking": "grid", "mask_ratio": 0.75},
    "normalised": {"norm_pix_loss": True},
    "loss on all": {"loss_on": "all"},
    "normalised, loss on all": {"norm_pix_loss": True, "loss_on": "all"},
    "mask tokens": {"encoder_mask_tokens": True},
    "mask tokens, no class token": {"encoder_mask_tokens": True, "class_token": False},
    "1 channel": {"in_channels": 1},
    "4 channels": {"in_channels": 4},
    "12 channels": {"in_channels": 12},
    "bfloat16": {"dtype": "bfloat16"},
    "recomputed": {"remat": True},
}


def inputs(config, batch=3, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(batch, *config.image_hw, config.in_channels))
    return jnp.asarray(images, jnp.float32), jnp.asarray(rng.random((batch, config.num_patches)), jnp.float32)


def build(config):
    """The compiled model, its parameters, images and noise."""
    model = MaskedAutoencoder(config)
    images, noise = inputs(config)
    params = jax.jit(model.init)(jax.random.key(0), images, noise)["params"]
    return jax.jit(lambda params, *args: model.apply({"params": params}, *args)), params, images, noise


@pytest.mark.parametrize("name", CHANGES)
def test_outputs_and_the_textbook_loss(name):
    config = dataclasses.replace(PLAIN, **CHANGES[name])
    apply, params, images, noise = build(config)
    out = apply(params, images, noise)

    length, seen = config.num_patches, config.num_patches if config.encoder_mask_tokens else config.keep
    assert out.pred.shape == out.target.shape == (3, length, config.patch_dim)
    assert out.mask.shape == out.ids_restore.shape == (3, length)
    assert out.latent.shape == (3, seen + config.class_token, config.encoder.width)
    assert {leaf.dtype.name for leaf in out} == {"float32", "int32"}

    patches = np.asarray(patchify(images, config.patch_hw), np.float64)
    if config.norm_pix_loss:
        deviation = np.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6)
        patches = (patches - patches.mean(-1, keepdims=True)) / deviation
    np.testing.assert_allclose(out.target, patches, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out.mask, make_mask(noise, config).hidden)

    errors = np.square(np.asarray(out.pred, np.float64) - np.asarray(out.target, np.float64)).mean(-1)
    counted = np.asarray(out.mask) if config.loss_on == "hidden" else np.ones_like(errors)
    rtol = 1e-2 if config.dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(out.loss, (errors * counted).sum() / counted.sum(), rtol=rtol)


@pytest.mark.parametrize("name", ["plain", "mask tokens", "no class token"])
def test_hidden_pixels_do_not_reach_the_prediction(name):
    config = dataclasses.replace(PLAIN, **CHANGES[name])
    apply, params, images, noise = build(config)
    out = apply(params, images, noise)
    hidden = np.asarray(out.mask)[..., None] == 1
    patches = np.asarray(patchify(images, config.patch_hw))

    def seen_with(changed):
        rows, columns = config.grid
        cells = changed.reshape(3, rows, columns, *config.patch_hw, config.in_channels)
        other = cells.transpose(0, 1, 3, 2, 4, 5).reshape(images.shape)
        return apply(params, jnp.asarray(other), noise)

    hidden_changed = seen_with(np.where(hidden, 9.0, patches).astype(np.float32))
    np.testing.assert_array_equal(hidden_changed.latent, out.latent)
    np.testing.assert_array_equal(hidden_changed.pred, out.pred)
    assert (hidden_changed.loss != out.loss).item()
    visible_changed = seen_with(np.where(hidden, patches, 9.0).astype(np.float32))
    assert (np.asarray(visible_changed.latent) != np.asarray(out.latent)).any(axis=(1, 2)).all()


@pytest.mark.parametrize("name", ["plain", "no class token", "learned"])
def test_encode_shows_the_encoder_every_patch(name):
    """The same tokens as from all patches in another order, which is what a mask that hides nothing would give."""
    config = dataclasses.replace(PLAIN, **CHANGES[name])
    _, params, images, _ = build(config)
    model = MaskedAutoencoder(config)
    whole = jax.jit(lambda params, images: model.apply({"params": params}, images, method="encode"))(params, images)
    assert whole.shape == (3, config.num_patches + config.class_token, 16)

    def shuffled(module, images):
        order = jnp.asarray(np.random.default_rng(0).permuted(np.tile(np.arange(12), (3, 1)), axis=1))
        mask = make_mask(order.astype(jnp.float32), config)
        patches = jnp.take_along_axis(patchify(images, config.patch_hw), mask.ids_shuffle[..., None], axis=1)
        return module.in_image_order(module.encoder(patches, mask), mask)

    again = jax.jit(lambda params, images: model.apply({"params": params}, images, method=shuffled))(params, images)
    np.testing.assert_allclose(again, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "noise"),
    [((2, 8, 8, 3), (2, 12)), ((2, 8, 12, 1), (2, 12)), ((2, 8, 12, 3), (2, 11)), ((2, 12, 8, 3), (2, 12))],
)
def test_wrong_shapes_are_refused_with_both(images, noise):
    model = MaskedAutoencoder(PLAIN)
    with pytest.raises(ValueError, match="do not fit the configuration") as refused:
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(images), jnp.zeros(noise))
    for shape in (images, noise, (8, 12, 3), (12,)):
        assert str(shape) in str(refused.value)


def test_recomputing_blocks_gives_equal_losses_and_gradients():
    _, params, images, noise = build(PLAIN)

    def value_and_grad(config):
        model = MaskedAutoencoder(config)
        return jax.jit(jax.value_and_grad(lambda params: model.apply({"params": params}, images, noise).loss))

    loss, gradient = value_and_grad(PLAIN)(params)
    loss_again, gradient_again = value_and_grad(dataclasses.replace(PLAIN, remat=True))(params)
    np.testing.assert_allclose(loss_again, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient_again, gradient)


def test_what_is_not_used_is_not_computed():
    """The loss alone leaves out the prediction of visible patches."""
    jax.config.update("jax_disable_most_optimizations", False)
    config = dataclasses.replace(PLAIN, image_size=(32, 32), patch_size=8)
    model = MaskedAutoencoder(config)
    images, noise = inputs(config)
    params = jax.eval_shape(model.init, jax.random.key(0), images, noise)["params"]

    def flops(*names):
        def wanted(params, images, noise):
            out = model.apply({"params": params}, images, noise)
            return [getattr(out, name) for name in names]

        return jax.jit(wanted).lower(params, images, noise).compile().cost_analysis()["flops"]

    loss, both = flops("loss"), flops("loss", "pred")
    # The last product over all patches, 2 x batch x L x d x P, has to be done for `pred`.
    product = 2 * 3 * config.num_patches * config.decoder.width * config.patch_dim
    assert both - loss > 0.9 * product
    assert flops("mask") < 0.1 * loss
