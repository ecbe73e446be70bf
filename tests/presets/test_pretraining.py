"""Recipes hold the values of their sources, cost what they claim, and their step runs."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.flops import training_flops
from mae_jax.presets.pretraining import PRESETS
from mae_jax.train.optimizers import learning_rate, peak_learning_rate
from mae_jax.train.step import Batch, init_state, make_step

COSTED = [name for name in PRESETS if name not in ("digits", "cifar10_small")]
TABLE_3 = {"imagenet_vit_base": "83.6 %", "imagenet_vit_large": "85.9 %", "imagenet_vit_huge": "86.9 %"}


@pytest.mark.parametrize("name", PRESETS)
def test_the_step_of_a_preset_fits_together(name):
    """Shapes alone, and two blocks of each stack: what the large ones compute does not fit here."""
    config = PRESETS[name]()
    stacks = {stack: replace(getattr(config.model, stack), depth=2) for stack in ("encoder", "decoder")}
    config = replace(config, model=replace(config.model, **stacks))
    step = make_step(config, steps_per_epoch=10.0, epochs=config.epochs)
    image = (config.batch_size, *config.model.image_hw, config.model.in_channels)
    batch = Batch(jax.ShapeDtypeStruct(image, jnp.uint8), jax.ShapeDtypeStruct(image[:1], jnp.uint32))
    state = jax.eval_shape(lambda: init_state(config))
    after, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics.loss.shape == ()


def test_the_tutorial_takes_a_step():
    config = PRESETS["mnist_tutorial"]()
    images = np.random.default_rng(0).integers(0, 256, (config.batch_size, 28, 28, 1), np.uint8)
    step = jax.jit(make_step(config, steps_per_epoch=469.0, epochs=config.epochs))
    state = jax.jit(lambda: init_state(config))()
    after, metrics = step(state, Batch(images, np.arange(config.batch_size, dtype=np.uint32)))
    assert np.isfinite(metrics.loss)
    assert float(metrics.learning_rate) == pytest.approx(1.5e-4)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after.params, state.params)
    assert 1.4e-4 < max(jax.tree.leaves(moved)) < 1.7e-4  # Adam's first step is the rate
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == 154_896


@pytest.mark.parametrize("name", COSTED)
def test_a_docstring_has_command_and_cost(name):
    text, config = PRESETS[name].__doc__, PRESETS[name]()
    assert f"mae-jax pretrain {name}" in text
    gflop, images, million, epochs, total = re.search(
        r"([\d.]+) GFLOP an image x ([\d,.]+)( M)? x ([\d,]+) = ([\d.e]+) FLOP", text
    ).groups()
    assert float(gflop) == pytest.approx(training_flops(config.model) / 1e9, rel=5e-3)
    assert float(epochs.replace(",", "")) == config.epochs
    counted = float(images.replace(",", "")) * (1e6 if million else 1)
    assert float(total) == pytest.approx(training_flops(config.model) * counted * config.epochs, rel=2e-2)
    assert TABLE_3.get(name, "") in text


def test_the_learning_rates_are_those_of_the_sources():
    """The authors scale by batch / 256; the others give the rate itself."""
    peaks = {name: peak_learning_rate(PRESETS[name]().optim, PRESETS[name]().batch_size) for name in COSTED}
    assert peaks.pop("mnist_tutorial") == pytest.approx(1.5e-4)
    assert peaks.pop("lightly_voc") == pytest.approx(1.5e-4)
    assert peaks == {name: pytest.approx(1.5e-4 * 4096 / 256) for name in peaks}
    for name in ("mnist_tutorial", "lightly_voc"):
        config = PRESETS[name]()
        for epoch in (0.0, 1.0, 7.5):
            rate = learning_rate(jnp.array(epoch), config.optim, batch_size=config.batch_size, epochs=config.epochs)
            assert float(rate) == pytest.approx(1.5e-4)
