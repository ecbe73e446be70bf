"""The masked autoencoder for every choice that a configuration offers."""

import dataclasses
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.config import ModelConfig, TransformerConfig
from mae_jax.models.mae import MaskedAutoencoder
from mae_jax.models.masking import Mask, make_mask
from mae_jax.models.patches import patchify

cut = inspect.unwrap(patchify)  # for NumPy arrays

PLAIN = ModelConfig(
    image_size=(8, 12),
    patch_size=(4, 2),
    encoder=TransformerConfig(width=16, depth=1, heads=2, mlp_ratio=2.0),
    decoder=TransformerConfig(width=12, depth=1, heads=3, mlp_ratio=2.0),
    mask_ratio=0.6,
)
# Together they hold every choice at least once.
CHANGES = {
    "plain": {},
    "sincos1d, no class token, block mask": {"positions": "sincos1d", "class_token": False, "masking": "block"},
    "learned, grid mask": {"positions": "learned", "masking": "grid", "mask_ratio": 0.75, "in_channels": 4},
    "learned, no class token, normalised": {"positions": "learned", "class_token": False, "norm_pix_loss": True},
    "loss on all, normalised": {"loss_on": "all", "norm_pix_loss": True, "in_channels": 12},
    "mask tokens, 1 channel": {"encoder_mask_tokens": True, "in_channels": 1},
    "mask tokens, no class token": {"encoder_mask_tokens": True, "class_token": False, "loss_on": "all"},
    "principal components": {"pca_components": 5},
    "bfloat16": {"dtype": "bfloat16"},
    "recomputed": {"remat": True},
}


def inputs(config, batch=3, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(batch, *config.image_hw, config.in_channels))
    return jnp.asarray(images, jnp.float32), jnp.asarray(rng.random((batch, config.num_patches)), jnp.float32)


def draw_params(model, *args):
    """Parameters of the right shapes, none of them zero; drawn by NumPy, since `init` takes seconds to compile."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype), shapes)


def build(config):
    """The compiled model, its parameters, images and noise."""
    model = MaskedAutoencoder(config)
    images, noise = inputs(config)
    params = draw_params(model, images, noise)
    return jax.jit(lambda params, *args: model.apply({"params": params}, *args)), params, images, noise


@pytest.mark.parametrize("name", CHANGES)
def test_outputs_and_the_textbook_loss(name):
    config = dataclasses.replace(PLAIN, **CHANGES[name])
    apply, params, images, noise = build(config)
    out = apply(params, images, noise)

    length, seen = config.num_patches, config.num_patches if config.encoder_mask_tokens else config.keep
    assert out.pred.shape == out.target.shape == (3, length, config.target_dim)
    assert out.mask.shape == out.ids_restore.shape == (3, length)
    assert out.latent.shape == (3, seen + config.class_token, config.encoder.width)
    assert {leaf.dtype.name for leaf in out} == {"float32", "int32"}

    patches = cut(np.asarray(images, np.float64), config.patch_hw)
    if config.norm_pix_loss:
        deviation = np.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6)
        patches = (patches - patches.mean(-1, keepdims=True)) / deviation
    if config.pca_components is not None:
        mean, basis = (np.asarray(params["target"][name], np.float64) for name in ("mean", "basis"))
        patches = (patches - mean) @ basis
    np.testing.assert_allclose(out.target, patches, rtol=1e-5, atol=1e-5)
    mask = jax.jit(make_mask, static_argnums=1)(noise, config)
    np.testing.assert_array_equal(out.mask, mask.hidden)
    np.testing.assert_array_equal(out.ids_restore, mask.ids_restore)

    errors = np.square(np.asarray(out.pred, np.float64) - np.asarray(out.target, np.float64)).mean(-1)
    counted = np.asarray(out.mask) if config.loss_on == "hidden" else np.ones_like(errors)
    rtol = 1e-2 if config.dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(out.loss, (errors * counted).sum() / counted.sum(), rtol=rtol)


@pytest.mark.parametrize("name", ["plain", "mask tokens, no class token", "loss on all, normalised"])
def test_recomputed_blocks_have_the_same_gradients(name):
    """In float64, where another formula would show."""
    with jax.enable_x64(True):
        found = []
        for remat in (False, True):
            config = dataclasses.replace(PLAIN, **CHANGES[name], dtype="float64", remat=remat)
            model = MaskedAutoencoder(config)
            images, noise = inputs(config)
            params = draw_params(model, images, noise)
            loss = lambda params, *args, model=model: model.apply({"params": params}, *args).loss  # noqa: E731
            found.append(jax.jit(jax.grad(loss))(params, images, noise))
        for once, again in zip(*map(jax.tree.leaves, found), strict=True):
            np.testing.assert_allclose(again, once, rtol=0, atol=1e-13 * np.abs(once).max())


@pytest.mark.parametrize("name", ["plain", "mask tokens, 1 channel"])
def test_hidden_pixels_do_not_reach_the_prediction(name):
    config = dataclasses.replace(PLAIN, **CHANGES[name])
    apply, params, images, noise = build(config)
    out = apply(params, images, noise)
    hidden = np.asarray(out.mask)[..., None] == 1
    patches = cut(np.asarray(images), config.patch_hw)

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


@pytest.mark.parametrize("name", ["plain", "learned, no class token, normalised"])
def test_encode_shows_the_encoder_every_patch(name):
    """The same tokens as from all patches in another order, which is what a mask that hides nothing would give."""
    config = dataclasses.replace(PLAIN, **CHANGES[name])
    _, params, images, _ = build(config)
    model = MaskedAutoencoder(config)
    order = np.random.default_rng(0).permuted(np.tile(np.arange(12), (3, 1)), axis=1)
    mask = Mask(jnp.asarray(order), jnp.asarray(order.argsort(axis=1)), jnp.zeros((3, 12)))

    @jax.jit
    def both(params, images):
        def shuffled(module, images):
            patches = jnp.take_along_axis(patchify(images, config.patch_hw), mask.ids_shuffle[..., None], axis=1)
            return module.in_image_order(module.encoder(patches, mask), mask)

        return [model.apply({"params": params}, images, method=method) for method in ("encode", shuffled)]

    whole, again = both(params, images)
    assert whole.shape == (3, config.num_patches + config.class_token, 16)
    np.testing.assert_allclose(again, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "noise"),
    [((2, 8, 8, 3), (2, 12)), ((2, 8, 12, 1), (2, 12)), ((2, 8, 12, 3), (2, 11)), ((2, 12, 8, 3), (2, 12))],
)
def test_wrong_shapes_are_refused_with_both(images, noise):
    model = MaskedAutoencoder(PLAIN)
    with pytest.raises(ValueError, match="do not fit the configuration") as caught:
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(images), jnp.zeros(noise))
    for shape in (images, noise, (8, 12, 3), (12,)):
        assert str(shape) in str(caught.value)


def test_what_is_not_used_is_not_computed():
    """The loss alone leaves out the prediction of visible patches."""
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


@pytest.mark.parametrize("loss_on", ["hidden", "all"])
def test_the_prediction_is_computed_once_outside_of_compiled_functions(loss_on):
    """Nothing drops what is not used there; the loss is taken of the one prediction."""
    apply, params, images, noise = build(dataclasses.replace(PLAIN, loss_on=loss_on))
    calls = []

    def count(call, args, kwargs, context):
        calls.append("/".join(context.module.path) + "." + context.method_name)
        return call(*args, **kwargs)

    with nn.intercept_methods(count):
        out = MaskedAutoencoder(dataclasses.replace(PLAIN, loss_on=loss_on)).apply({"params": params}, images, noise)
    assert calls.count("decoder.predict") == calls.count("decoder/pred.__call__") == 1
    compiled = apply(params, images, noise)
    np.testing.assert_allclose(out.loss, compiled.loss, rtol=1e-5)
    np.testing.assert_allclose(out.pred, compiled.pred, rtol=1e-4, atol=1e-5)
