"""The encoder with a head computes what the authors' fine-tuned model computes, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mae_jax.config import ClassifierConfig, ModelConfig, TransformerConfig
from mae_jax.models.classifier import Classifier
from mae_jax.port.keys import entries, from_fair, frozen_tables
from parity import torch_mae

MODEL = ModelConfig(
    image_size=(8, 12),
    patch_size=(4, 2),
    encoder=TransformerConfig(width=16, depth=2, heads=2, mlp_ratio=2.0),
    decoder=TransformerConfig(width=8, depth=1, heads=2),
    dtype="float64",
)
CONFIGS = {
    "mean": ClassifierConfig(MODEL, 5, "mean"),
    "class token": ClassifierConfig(MODEL, 5, "class"),
    "mean, no class token, learned": ClassifierConfig(
        dataclasses.replace(MODEL, class_token=False, positions="learned"), 5, "mean"
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients(name):
    config, generator = CONFIGS[name], np.random.default_rng(0)
    tensors = {entry.key: 0.3 * generator.standard_normal(entry.shape) for entry in entries(config)}
    images = generator.standard_normal((3, 8, 12, 3))
    theirs = torch_mae.Classifier(config).double()
    theirs.load_state_dict({key: torch.from_numpy(v) for key, v in (tensors | frozen_tables(config)).items()})
    logits = theirs(torch.from_numpy(images).movedim(-1, 1))
    weight = torch.arange(15.0, dtype=torch.float64).reshape(3, 5)
    (logits * weight).sum().backward()
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, from_fair(tensors, config))

        def along(params):
            ours = Classifier(config).apply({"params": params}, jnp.asarray(images))
            return (ours * weight.numpy()).sum(), ours

        (_, ours), gradients = jax.jit(jax.value_and_grad(along, has_aux=True))(params)
    logits = logits.detach().numpy()
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-13 * np.abs(logits).max())
    expected = from_fair({entry.key: theirs.get_parameter(entry.key).grad.numpy() for entry in entries(config)}, config)
    for found, wanted in zip(*map(jax.tree.leaves, (gradients, expected)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_it_has_the_parameters_of_the_table(name):
    """With mean pooling there is no LayerNorm behind the blocks."""
    config = CONFIGS[name]
    with jax.enable_x64(True):
        shapes = jax.eval_shape(Classifier(config).init, jax.random.key(0), jnp.zeros((1, 8, 12, 3)))["params"]
    found = {tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)}
    assert found == {entry.path for entry in entries(config)}
