"""Encoders of fine-tuned PyTorch checkpoints, beside fresh ones of the same model."""

import jax
import numpy as np
import pytest

import mae_jax
from mae_jax.config import ClassifierConfig, ModelConfig, TransformerConfig
from mae_jax.evaluation.encoders import load_pretrained, untrained
from mae_jax.evaluation.features import image_features
from mae_jax.models.classifier import Classifier
from mae_jax.train.objective import normalise_images
from tests.port.conftest import draw_params
from tests.refusals import refused

MODEL = ModelConfig(image_size=16, patch_size=8, encoder=TransformerConfig(width=24, depth=1, heads=3))


@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_a_classifier(pooling, tmp_path):
    pytest.importorskip("torch")
    config = ClassifierConfig(MODEL, 5, pooling)
    mae_jax.save_torch(draw_params(config), config, tmp_path / "tuned.pth", layout="fair")
    read = load_pretrained(str(tmp_path / "tuned.pth"), encoder_heads=3)
    assert read.model.encoder == MODEL.encoder
    assert (read.step, read.run) == (None, None)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    fresh = untrained(read)
    assert jax.tree.structure(fresh) == jax.tree.structure(read.params)
    pixels, apply = normalise_images(images, read.augment, "float32"), jax.jit(Classifier(config).apply)
    for params in (read.params, fresh):
        found = image_features(params, images, read.model, read.augment, pooling)
        logits = found @ params["head"]["kernel"] + params["head"]["bias"]
        np.testing.assert_allclose(logits, apply({"params": params}, pixels), rtol=1e-4, atol=1e-5)


def test_a_run_knows_its_heads(tmp_path):
    mae_jax.save_torch(draw_params(MODEL), MODEL, tmp_path / "run", layout="jax")
    with refused("encoder_heads", "--encoder-heads 3"):
        load_pretrained(str(tmp_path / "run"), encoder_heads=3)
