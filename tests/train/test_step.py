"""One pure step: what it measures, what it updates, and where its noise comes from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax import rng
from mae_jax.models.mae import MaskedAutoencoder
from mae_jax.presets.pretraining import PRESETS
from mae_jax.train.objective import Batch, normalise_images
from mae_jax.train.optimizers import adamw_direction
from mae_jax.train.step import init_state, loss_and_gradients, make_step


@functools.cache
def compiled(config):
    return jax.jit(make_step(config, steps_per_epoch=4.0, epochs=10.0))


def assert_trees_close(found, expected, rtol, atol=0.0):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


def norm(tree):
    return np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(tree)))


def test_bytes_become_normalised_pixels(tiny):
    config = tiny()
    images = np.array([0, 51, 255], np.uint8).reshape(1, 1, 3, 1)
    pixels = normalise_images(images, config.augment, "float32")
    np.testing.assert_allclose(np.ravel(pixels), [-0.75, -0.25, 1.75], rtol=1e-6)


def test_a_seed_draws_what_it_drew():
    """Of the digits, whose results by seed README.md has: a change of Flax, or of the modules, could draw others."""
    params = init_state(PRESETS["digits"]()).params
    total = sum(np.abs(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(params))
    assert total == pytest.approx(18158.4135, rel=1e-7)


def test_the_state_depends_on_the_seed_alone(tiny, begin):
    first, other = begin(tiny()), begin(tiny(seed=1))
    again = jax.jit(lambda: init_state(tiny()))()
    jax.tree.map(np.testing.assert_array_equal, again, first)
    assert (np.asarray(first.params["encoder"]["cls_token"]) != other.params["encoder"]["cls_token"]).all()
    assert int(first.step) == 0
    assert first.average is None


@pytest.fixture
def two_steps(tiny, begin, batches):
    """Two updates with a running average and clipping; the second by hand as well."""
    config = tiny(ema_decay=0.75, clip_norm=0.5, eps=1e-2)  # eps: the key bias's gradient is noise
    step, given = compiled(config), batches(2)
    before, _ = step(begin(config), given[0])
    after, metrics = step(before, given[1])

    images = normalise_images(given[1].images, config.augment, "float32")
    noise = rng.example_uniforms(rng.device_key(config.seed, "mask"), given[1].positions, config.model.num_patches)
    model = MaskedAutoencoder(config.model)
    loss, gradients = jax.jit(lambda params: loss_and_gradients(model, params, images, noise))(before.params)
    return config, before, after, metrics, loss, gradients


def test_a_step_by_hand(two_steps):
    config, before, after, metrics, loss, gradients = two_steps
    rate = 0.16 * 16 / 256 / 4  # a quarter of the warm-up: the second of 4 steps
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-6)
    np.testing.assert_allclose(metrics.learning_rate, rate, rtol=1e-6)
    # Before clipping: what the gradient was, not what was left of it.
    np.testing.assert_allclose(metrics.grad_norm, norm(gradients), rtol=1e-5)
    assert metrics.grad_norm > config.optim.clip_norm

    update = jax.jit(adamw_direction(config.optim).update)
    direction, optimizer = jax.device_get(update(gradients, before.optimizer, before.params))
    before, after = jax.device_get((before, after))
    expected = jax.tree.map(lambda p, d: p - rate * d, before.params, direction)
    assert_trees_close(after.params, expected, rtol=1e-4, atol=1e-6)
    assert_trees_close(after.optimizer, optimizer, rtol=1e-4, atol=1e-6)
    assert int(after.step) == int(before.step) + 1 == 2

    averaged = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, before.average, after.params)
    assert_trees_close(after.average, averaged, rtol=1e-5, atol=1e-7)


def test_the_first_step_has_rate_zero_and_moves_nothing(tiny, begin, batches):
    config = tiny()
    before = begin(config)
    after, metrics = compiled(config)(before, batches(1)[0])
    assert metrics.learning_rate == 0
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    assert norm(after.optimizer) > 0


def test_accumulated_gradients_are_those_of_the_whole_batch(tiny, begin):
    config = tiny()
    model = MaskedAutoencoder(config.model)
    rows = np.random.default_rng(0)
    images = jnp.asarray(rows.normal(size=(16, 8, 8, 1)), jnp.float32)
    noise = jnp.asarray(rows.random((16, 16)), jnp.float32)
    params = begin(config).params
    whole = jax.jit(lambda params: loss_and_gradients(model, params, images, noise))(params)
    summed = jax.jit(lambda params: loss_and_gradients(model, params, images, noise, accumulate=4))(params)
    np.testing.assert_allclose(summed[0], whole[0], rtol=1e-6)
    size = norm(whole[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * size), summed[1], whole[1])


def test_accumulation_gives_the_same_run(tiny, begin, batches):
    runs = []
    for accumulate in (1, 4):
        config = tiny(accumulate=accumulate)
        step, state, losses = compiled(config), begin(config), []
        for batch in batches(6):
            state, metrics = step(state, batch)
            losses.append(float(metrics.loss))
        runs.append(losses)
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-5)
    assert len(set(runs[0])) == 6


def test_positions_fix_the_noise(tiny, begin, batches):
    """The mask of an example goes with its position, not with its place in the batch or with the step."""
    config = tiny()
    step, batch = compiled(config), batches(1)[0]
    state = begin(config)
    loss = step(state, batch)[1].loss
    order = np.random.default_rng(0).permutation(16)
    shuffled = Batch(batch.images[order], batch.positions[order])
    np.testing.assert_allclose(step(state, shuffled)[1].loss, loss, rtol=1e-6)
    np.testing.assert_array_equal(step(state._replace(step=jnp.int32(5)), batch)[1].loss, loss)
    for distance in (16, 2**32 - 100):  # positions beyond 2^31 are numbers like others
        moved = Batch(batch.images, batch.positions + np.uint32(distance))
        assert abs(float(step(state, moved)[1].loss - loss)) > 1e-5 * float(loss)
