"""Features of whole images: the encoder's tokens, pooled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.config import AugmentConfig, ModelConfig, TransformerConfig
from mae_jax.data.digits import DigitsSource
from mae_jax.data.evaluation import load_samples
from mae_jax.evaluation.features import image_features, source_features
from mae_jax.models.mae import MaskedAutoencoder

CONFIG = ModelConfig(
    image_size=8,
    patch_size=4,
    in_channels=1,
    encoder=TransformerConfig(width=16, depth=1, heads=2, mlp_ratio=2.0),
    decoder=TransformerConfig(width=8, depth=1, heads=2, mlp_ratio=2.0),
)
AUGMENT = AugmentConfig(mean=(0.3,), std=(0.4,))


def draw_params(config):
    rng = np.random.default_rng(0)
    images, noise = jnp.zeros((1, 8, 8, 1)), jnp.zeros((1, 4))
    shapes = jax.eval_shape(MaskedAutoencoder(config).init, jax.random.key(0), images, noise)["params"]
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.2, p.shape), p.dtype), shapes)


@pytest.mark.parametrize("class_token", [True, False])
def test_pooling(class_token):
    """The mean is that of the patches alone: the class token is not among them."""
    config = dataclasses.replace(CONFIG, class_token=class_token)
    params, images = draw_params(config), np.random.default_rng(1).integers(0, 256, (5, 8, 8, 1), np.uint8)
    pixels = jnp.asarray((images / 255 - 0.3) / 0.4, jnp.float32)
    encode = jax.jit(lambda params, x: MaskedAutoencoder(config).apply({"params": params}, x, method="encode"))
    tokens = np.asarray(encode(params, pixels))
    found = image_features(params, images, config, AUGMENT, "mean")
    np.testing.assert_allclose(found, tokens[:, -4:].mean(axis=1), rtol=1e-4, atol=1e-5)
    if class_token:
        found = image_features(params, images, config, AUGMENT, "class")
        np.testing.assert_allclose(found, tokens[:, 0], rtol=1e-4, atol=1e-5)


def test_every_image_of_a_source_once_and_in_order():
    source, params = DigitsSource(), draw_params(CONFIG)
    features, labels, broken = source_features(params, source, CONFIG, AUGMENT, "mean", batch_size=512)
    assert features.shape == (1797, 16)
    assert broken.size == 0
    assert labels.tolist() == [source.label(index) for index in range(1797)]
    one = np.asarray(source.load(1000))[None, ..., None]
    expected = image_features(params, one, CONFIG, AUGMENT, "mean")
    np.testing.assert_allclose(features[1000], expected[0], rtol=1e-4, atol=1e-5)


def test_the_centre_crop_is_the_augmentations():
    source, params = DigitsSource(), draw_params(CONFIG)
    augment = dataclasses.replace(AUGMENT, evaluation_crop=0.5)
    features = source_features(params, source, CONFIG, augment, "mean", batch_size=512).values
    images = load_samples(source, [3, 1796], 2, (8, 8), 0.5)
    expected = image_features(params, images, CONFIG, augment, "mean")
    np.testing.assert_allclose(features[[3, 1796]], expected, rtol=1e-4, atol=1e-5)
    whole = image_features(params, load_samples(source, [3, 1796], 2, (8, 8)), CONFIG, augment, "mean")
    assert np.abs(np.asarray(whole) - features[[3, 1796]]).max() > 0.01
