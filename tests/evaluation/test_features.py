"""Features of whole images: the encoder's tokens, pooled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mae_jax.config import ClassifierConfig
from mae_jax.data.evaluation import load_samples
from mae_jax.data.sources.digits import DigitsSource
from mae_jax.data.sources.folder import FolderSource
from mae_jax.evaluation.features import check_features, image_features, source_features
from mae_jax.models.blocks import Block
from mae_jax.models.classifier import Classifier
from mae_jax.models.mae import MaskedAutoencoder
from mae_jax.train.objective import normalise_images
from tests.refusals import refused
from tests.tiny import TINY

CONFIG, AUGMENT = dataclasses.replace(TINY.model, patch_size=4), TINY.augment


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


@pytest.mark.parametrize(("remat", "blocks"), [(False, (0, -1)), (True, (-2,))])
def test_blocks(remat, blocks):
    """What a block gives, from 0 and back from -1."""
    config = dataclasses.replace(CONFIG, encoder=dataclasses.replace(CONFIG.encoder, depth=3), remat=remat)
    params, images = draw_params(config), np.random.default_rng(1).integers(0, 256, (5, 8, 8, 1), np.uint8)

    @jax.jit
    def outputs(params, images):
        pixels = normalise_images(images, AUGMENT, "float32")
        _, seen = MaskedAutoencoder(dataclasses.replace(config, remat=False)).apply(
            {"params": params},
            pixels,
            method="encode",
            capture_intermediates=lambda module, method: isinstance(module, Block) and method == "__call__",
        )
        return [seen["intermediates"]["encoder"][f"block_{i}"]["__call__"][0] for i in range(3)]

    tokens = outputs(params, images)
    for block in blocks:
        mean = image_features(params, images, config, AUGMENT, "mean", block)
        np.testing.assert_allclose(mean, tokens[block][:, 1:].mean(axis=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_a_classifier_gives_what_its_head_sees(pooling):
    config = ClassifierConfig(CONFIG, 7, pooling)
    images = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 1), np.uint8)
    pixels = normalise_images(images, AUGMENT, "float32")
    shapes = jax.eval_shape(Classifier(config).init, jax.random.key(0), pixels)["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.2, p.shape), p.dtype), shapes)
    found = image_features(params, images, CONFIG, AUGMENT, pooling)
    logits = jax.jit(Classifier(config).apply)({"params": params}, pixels)
    head = params["head"]
    np.testing.assert_allclose(found @ head["kernel"] + head["bias"], logits, rtol=1e-4, atol=1e-5)


def test_features_that_are_not_there_are_refused():
    params = {"encoder": {"norm": {}}}
    check_features(params, CONFIG, "class", -1)
    for block in (1, -2):
        with refused("block", f"{block} is not in -1 .. 0"):
            check_features(params, CONFIG, "mean", block)
    with refused("pooling", "this model has none"):
        check_features(params, dataclasses.replace(CONFIG, class_token=False), "class", None)
    with refused("pooling", "has no LayerNorm"):
        check_features({"encoder": {}}, CONFIG, "class", None)


def test_broken_files_and_a_last_batch_that_is_not_full(tmp_path):
    """On eight devices, batches of 8; progress counts every file."""
    params, reported = draw_params(CONFIG), []
    for i in range(21):
        Image.new("L", (9, 12), 10 * i).save(tmp_path / f"{i:02}.png")
    for i in (4, 20):
        (tmp_path / f"{i:02}.png").write_bytes(b"not an image")
    source = FolderSource(str(tmp_path), "L")
    found = source_features(params, source, CONFIG, AUGMENT, "mean", 6, report=reported.append)
    assert found.broken.tolist() == [4, 20]
    assert (found.values.shape, found.values.dtype, found.labels.shape) == ((19, 16), np.float32, (19,))
    assert reported == [8, 8, 5]
    whole = source_features(params, source, CONFIG, AUGMENT, "mean")
    np.testing.assert_allclose(whole.values, found.values, rtol=1e-5, atol=1e-6)
    for file in tmp_path.iterdir():
        file.write_bytes(b"not an image")
    with refused("data", "00.png"):
        source_features(params, source, CONFIG, AUGMENT, "mean")
