"""Eight simulated devices compute what one computes."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mae_jax import rng
from mae_jax.config import TransformerConfig
from mae_jax.models.mae import MaskedAutoencoder
from mae_jax.train.build import Length, build_engine
from mae_jax.train.engines import AXIS, check_attention, choose_devices, pmap_engine
from mae_jax.train.objective import normalise_images
from mae_jax.train.step import loss_and_gradients, make_step
from tests.refusals import refused


def engine_of(config, count):
    return pmap_engine(
        functools.partial(_step, config), jax.local_devices()[:count], config.batch_size, config.accumulate
    )


def _step(config, axis):
    return make_step(config, steps_per_epoch=4.0, epochs=10.0, axis_name=axis)


def losses_on(config, count, begin, given):
    engine = engine_of(config, count)
    state, losses = engine.put_state(begin(config)), []
    for batch in given:
        state, metrics = engine.step(state, engine.put_batch(batch))
        losses.append(float(metrics.loss))
    return losses


@pytest.fixture(scope="module")
def reference():
    """What one device computes, kept from one test to the next."""
    return {}


@pytest.mark.parametrize("count", [2, 4, 8])
def test_losses_do_not_depend_on_the_number_of_devices(tiny, begin, batches, reference, count):
    # A rate at which the loss falls; Adam's eps keeps it from magnifying the rounding of the key bias's zero gradient.
    config = tiny(base_lr=0.04, eps=1e-4)
    given = batches(20)
    if "losses" not in reference:
        reference["losses"] = losses_on(config, 1, begin, given)
    losses = losses_on(config, count, begin, given)
    np.testing.assert_allclose(losses, reference["losses"], rtol=1e-6)
    assert len(set(losses)) == 20
    assert losses[-1] < 0.95 * losses[0]


def gradients_on(config, count, params, batch):
    """Loss and gradients as the step averages them, which Adam would hide: it divides any factor out."""
    model = MaskedAutoencoder(config.model)

    def compute(params, batch):
        images = normalise_images(batch.images, config.augment, "float32")
        noise = rng.example_uniforms(rng.device_key(config.seed, "mask"), batch.positions, config.model.num_patches)
        loss, gradients = loss_and_gradients(model, params, images, noise, config.accumulate)
        return jax.lax.pmean((loss, gradients), AXIS)

    engine = engine_of(config, count)
    compiled = jax.pmap(compute, axis_name=AXIS, in_axes=(None, 0), out_axes=None, devices=engine.devices)
    return jax.device_get(compiled(engine.put_state(params), engine.put_batch(batch)))


def gradients_on_one(reference, config, params, batch):
    if "gradients" not in reference:
        reference["gradients"] = gradients_on(config, 1, params, batch)
    return reference["gradients"]


@pytest.mark.parametrize(("count", "accumulate"), [(8, 1), (2, 4)])
def test_gradients_do_not_depend_on_the_number_of_devices(tiny, begin, batches, reference, count, accumulate):
    params, batch = begin(tiny()).params, batches(1)[0]
    loss, gradients = gradients_on_one(reference, tiny(), params, batch)
    loss_again, again = gradients_on(tiny(accumulate=accumulate), count, params, batch)
    np.testing.assert_allclose(loss_again, loss, rtol=1e-6)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * largest), again, gradients)


def test_a_step_on_devices(tiny, begin, batches, reference):
    """The state is donated and stays replicated; the norm is that of the averaged gradient."""
    engine, batch = engine_of(tiny(), 4), batches(1)[0]
    before = engine.put_state(begin(tiny()))
    after, metrics = engine.step(before, engine.put_batch(batch))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.optimizer)))
    for leaf, start in zip(jax.tree.leaves(after), jax.tree.leaves(begin(tiny())), strict=True):
        assert leaf.shape == start.shape
        assert leaf.is_fully_replicated
        assert len(leaf.devices()) == 4
        parts = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert all((part == parts[0]).all() for part in parts)
    loss, gradients = gradients_on_one(reference, tiny(), begin(tiny()).params, batch)
    norm = np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(gradients)))
    np.testing.assert_allclose([metrics.loss, metrics.grad_norm], [loss, norm], rtol=1e-5)


def test_a_batch_is_cut_in_order(tiny, batches):
    batch = batches(1)[0]
    put = engine_of(tiny(), 4).put_batch(batch)
    assert put.images.shape == (4, 4, 8, 8, 1)
    shards = sorted(put.positions.addressable_shards, key=lambda shard: shard.device.id)
    assert [np.ravel(shard.data).tolist() for shard in shards] == np.arange(16).reshape(4, 4).tolist()


@pytest.mark.parametrize(("batch_size", "accumulate", "nearest"), [(20, 1, 16), (20, 2, 16), (30, 1, 32), (2, 1, 8)])
def test_a_batch_that_does_not_divide_is_refused(tiny, batch_size, accumulate, nearest):
    with refused("batch_size", str(batch_size), f"8 devices x accumulate {accumulate}", f"nearest that is: {nearest}"):
        engine_of(tiny(batch_size=batch_size, accumulate=accumulate), 8)


def test_devices_are_the_first_ones():
    assert choose_devices(None) == jax.local_devices()
    assert choose_devices(3) == jax.local_devices()[:3]
    with refused("devices", "9", "this host has 8 (cpu)"):
        choose_devices(9)


def test_cudnn_is_refused_where_there_is_none(tiny):
    config, wide = tiny(), TransformerConfig(width=16, depth=1, heads=2)
    fused = dataclasses.replace(config.model, dtype="bfloat16", attention="cudnn", encoder=wide, decoder=wide)
    check_attention(config.model, jax.local_devices())
    for capability in ("8.0", "9.0", "10.0", "12.1"):  # numbers, not text
        check_attention(fused, [SimpleNamespace(platform="gpu", compute_capability=capability)])
    gpu = [SimpleNamespace(platform="gpu", compute_capability="8.0")]
    for fsdp in (1, 2, 3):
        check_attention(fused, gpu, fsdp)
    with refused("fsdp", "encoder.heads 2 over fsdp 4", "--fsdp"):
        check_attention(fused, gpu, 4)
    for older in ("7.5", "gfx942"):
        with refused("model.attention", "capability 8.0 or more", older):
            check_attention(fused, [SimpleNamespace(platform="gpu", compute_capability=older)])
    with refused("model.attention", "cudnn needs an NVIDIA GPU, the device here is cpu"):
        build_engine(dataclasses.replace(config, model=fused), Length(10, 1.0, 10.0))


def test_simulated_devices_do_not_run_ahead(tiny):
    """They share threads: several collectives at once would wait for each other for ever."""
    assert [engine_of(tiny(), count).in_flight for count in (1, 2)] == [8, 1]
