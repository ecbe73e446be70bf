"""Recipes of fine-tuning and probing hold the authors' values, cost what they claim, and their step runs."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from mae_jax.models.flops import stack_flops
from mae_jax.presets.transfer import FINETUNE, PROBE
from mae_jax.train.objective import Batch
from mae_jax.train.optimizers import peak_learning_rate
from mae_jax.train.step import init_state, make_step

RECIPES = {
    f"{command} {name}": recipe
    for command, table in (("finetune", FINETUNE), ("probe", PROBE))
    for name, recipe in table.items()
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_step_of_a_recipe_fits_together(name):
    """Shapes alone, two blocks deep."""
    config = RECIPES[name]()
    config = replace(config, classes=7, model=replace(config.model, encoder=replace(config.model.encoder, depth=2)))
    step = make_step(config, steps_per_epoch=10.0, epochs=config.epochs)
    image = (config.batch_size, *config.model.image_hw, config.model.in_channels)
    batch = Batch(
        jax.ShapeDtypeStruct(image, jnp.uint8),
        jax.ShapeDtypeStruct(image[:1], jnp.uint32),
        labels=jax.ShapeDtypeStruct(image[:1], jnp.int32),
    )
    state = jax.eval_shape(lambda: init_state(config))
    after, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics.loss.shape == ()


# https://github.com/facebookresearch/mae/blob/main/FINETUNE.md: epochs, rate, layer decay, drop path.
@pytest.mark.parametrize(
    ("size", "values"),
    [("base", (100, 2e-3, 0.65, 0.1)), ("large", (50, 4e-3, 0.75, 0.2)), ("huge", (50, 4e-3, 0.75, 0.3))],
)
def test_the_authors_values(size, values):
    config = FINETUNE[f"imagenet_vit_{size}"]()
    rate = peak_learning_rate(config.optim, config.batch_size)
    assert (config.epochs, pytest.approx(rate), config.layer_decay, config.drop_path) == values
    assert (config.batch_size, config.optim.weight_decay, config.optim.warmup_epochs) == (1024, 0.05, 5)
    assert (config.optim.beta1, config.optim.beta2, config.optim.min_lr) == (0.9, 0.999, 1e-6)
    mix, augment = config.mix, config.augment
    assert (mix.mixup, mix.cutmix, mix.smoothing, mix.erase) == (0.8, 1.0, 0.1, 0.25)
    assert (augment.rand_augment, augment.rand_augment_std, augment.scale) == (9.0, 0.5, (0.08, 1.0))
    assert (config.pooling, config.head_std, config.last_blocks) == ("mean", 2e-5, None)
    probe = PROBE[f"imagenet_vit_{size}"]()
    assert (probe.epochs, probe.batch_size, probe.optim.base_lr, probe.optim.warmup_epochs) == (90, 16384, 0.1, 10)
    assert (probe.optim.optimizer, probe.optim.momentum, probe.optim.trust) == ("lars", 0.9, 0.001)
    assert (probe.optim.weight_decay, probe.last_blocks, probe.batch_norm, probe.pooling) == (0, 0, True, "class")
    assert (probe.head_std, probe.mix.mixes, probe.augment.distorts) == (0.01, False, False)


@pytest.mark.parametrize("name", [name for name in RECIPES if "GFLOP" in (RECIPES[name].__doc__ or "")])
def test_a_docstring_has_command_and_cost(name):
    recipe = RECIPES[name]
    text, config = recipe.__doc__, replace(recipe(), classes=10)
    assert f"mae-jax {name} --init" in text
    gflop, images, million, epochs, total = re.search(
        r"([\d.,]+) GFLOP an image x ([\d,.]+)( M)? x ([\d,]+) = ([\d.e]+) FLOP", text
    ).groups()
    model, width = config.model, config.model.encoder.width
    ends = model.num_patches * model.patch_dim * width + width * config.classes  # every patch is visible
    forward = 2 * ends + stack_flops(model.encoder, model.num_patches + int(model.class_token))
    counted = forward * (1 if config.last_blocks == 0 else 3)
    assert float(gflop.replace(",", "")) == pytest.approx(counted / 1e9, rel=2e-2)
    assert float(epochs) == config.epochs
    every = float(images.replace(",", "")) * (1e6 if million else 1) * config.epochs
    assert float(total) == pytest.approx(counted * every, rel=3e-2)
