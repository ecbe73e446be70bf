"""A bfloat16 model keeps LayerNorm, softmax and loss in float32: inputs are such that bfloat16 would be far off."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import torch

from mae_jax.config import ModelConfig, TransformerConfig
from mae_jax.models import blocks as layers
from mae_jax.models import gradients, mae
from mae_jax.port.keys import from_fair
from parity import torch_mae
from parity.compare import Pair
from parity.ours import Ours
from parity.reference import Reference, draw_weights


def mixed_precision(ours: Ours, reference: Reference) -> Iterator[Pair]:
    """The three, each by itself, of a small model whatever model is compared."""
    generator = np.random.default_rng(reference.run_config.seed)
    yield layer_norm(generator)
    yield softmax(generator)
    yield loss(generator)


def layer_norm(generator: np.random.Generator) -> Pair:
    """A mean of 64: there bfloat16 is spaced by 1/2, half a standard deviation."""
    x = 64 + generator.standard_normal((2, 8, 32)).astype(np.float32)
    ours = layers.LayerNorm("bfloat16").apply(
        {"params": {"scale": np.ones(32, "float32"), "bias": np.zeros(32, "float32")}}, jnp.asarray(x)
    )
    theirs = torch.nn.functional.layer_norm(torch.from_numpy(x), (32,), eps=torch_mae.EPS)
    return Pair("mixed precision", "LayerNorm of 64 + normal", ours, theirs, "bfloat16")


def softmax(generator: np.random.Generator) -> Pair:
    """Scores of some tens: there bfloat16 is spaced by 1/8. A head of 16, so that the scale, 1/4, rounds nothing."""
    heads = [torch.from_numpy(generator.normal(0, scale, (1, 2, 64, 16))).bfloat16() for scale in (4, 4, 1)]
    query, key, value = (jnp.asarray(values.float().numpy(), "bfloat16") for values in heads)
    ours = gradients.attend(query, key, value, "bfloat16")
    their_query, their_key, their_value = (values.double() for values in heads)
    theirs = torch.softmax(their_query @ their_key.mT / 4, dim=-1) @ their_value
    return Pair("mixed precision", "softmax of large scores", ours, theirs, "bfloat16")


def loss(generator: np.random.Generator) -> Pair:
    """The loss against the mean squared error of the model's own prediction."""
    stack = TransformerConfig(width=16, depth=1, heads=1)
    config = ModelConfig(8, 2, 1, stack, stack, loss_on="all", dtype="bfloat16")
    weights = draw_weights(torch_mae.MaskedAutoencoder(config), generator)
    params = jax.tree.map(np.float32, from_fair(weights, config))
    images, noise = generator.standard_normal((2, 8, 8, 1)), generator.random((2, 16))
    model = mae.MaskedAutoencoder(config)
    apply = jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))
    out = apply(params, np.float32(images), np.float32(noise))
    theirs = np.square(np.asarray(out.pred, np.float64) - np.asarray(out.target, np.float64)).mean()
    return Pair("mixed precision", "loss of its own prediction", out.loss, theirs, "float32")
