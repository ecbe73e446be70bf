"""Engines jit and fsdp: the same state and step, cut over a mesh of eight simulated devices."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mae_jax.storage.checkpoints import Checkpoints
from mae_jax.storage.loading import load_params
from mae_jax.train.build import Length, build_engine, state_shapes
from mae_jax.train.mesh import SHARD, cut, make_mesh
from mae_jax.train.objective import Batch
from mae_jax.train.step import init_state
from tests.refusals import refused

LENGTH = Length(40, 4.0, 10.0)
EVERYTHING = {"accumulate": 2, "ema_decay": 0.9, "clip_norm": 0.5, "base_lr": 0.04, "eps": 1e-4}


def build(config, **changes):
    return build_engine(dataclasses.replace(config, **changes), LENGTH)


def steps(engine, state, given):
    losses = []
    for batch in given:
        state, metrics = engine.step(state, engine.put_batch(batch))
        losses.append(float(metrics.loss))
    return state, losses


@pytest.mark.parametrize(
    ("shape", "count", "axis"),
    [((16, 48), 8, 1), ((48, 16), 8, 0), ((12, 40), 8, 1), ((16, 16), 8, 0), ((1, 1, 16), 4, 2), ((16, 48), 1, None)],
)
def test_the_longest_dimension_that_divides_is_cut(shape, count, axis):
    expected = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, SHARD)
    assert cut(shape, count) == expected


@pytest.mark.parametrize("shape", [(), (64,), (3, 5)])
def test_what_is_small_or_odd_stays_whole(shape):
    assert cut(shape, 8) == PartitionSpec()


@pytest.mark.parametrize(
    ("count", "fsdp", "words"),
    [(2, 4, ["fsdp 4", "there are 2"]), (8, 3, ["fsdp 3 does not divide 8 devices", "below that does: 2"])],
)
def test_devices_that_make_no_groups_are_refused(count, fsdp, words):
    with refused("fsdp", *words):
        make_mesh(jax.devices()[:count], fsdp)


@pytest.mark.parametrize("engine", ["jit", "fsdp"])
def test_a_batch_that_does_not_divide_is_refused(tiny, engine):
    with refused("batch_size"):
        build(tiny(batch_size=20, accumulate=2), engine=engine)


def test_no_device_holds_more_than_its_part_of_the_state(tiny):
    config = tiny()
    engine = build(config, engine="fsdp")
    state = engine.init_state(lambda: init_state(config))
    matrices = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim > 1]
    assert all(8 * leaf.addressable_data(0).size == leaf.size for leaf in matrices)
    assert len(matrices) > 3 * 10  # of the parameters and of both moments
    whole = build(config, engine="pmap").init_state(lambda: init_state(config))
    jax.tree.map(np.testing.assert_array_equal, state, whole)
    after, _ = engine.step(state, engine.put_batch(_batch(config)))
    assert jax.tree.all(jax.tree.map(lambda x, wanted: x.sharding == wanted, after, engine.shardings(after)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.optimizer)))


def _batch(config):
    images = np.random.default_rng(0).integers(0, 256, (config.batch_size, 8, 8, 1), np.uint8)
    return Batch(images, np.arange(config.batch_size, dtype=np.uint32))


def test_each_device_has_its_own_rows(tiny):
    engine = build(tiny(), engine="fsdp", fsdp=2, devices=4)
    put = engine.put_batch(_batch(tiny()))
    shards = sorted(put.positions.addressable_shards, key=lambda shard: shard.device.id)
    assert [np.ravel(shard.data).tolist() for shard in shards] == np.arange(16).reshape(4, 4).tolist()


def test_weights_travel_and_activations_do_not(tiny):
    """The compiler gathers matrices of the state, and nothing with a batch in it."""
    config = dataclasses.replace(tiny(), batch_size=48)
    engine = build(config, engine="fsdp")
    shapes = state_shapes(config)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, engine.shardings(shapes)
    )
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), engine.put_batch(_batch(config))
    )
    program = engine.step.lower(abstract, batch).compile().as_text()
    sizes = {leaf.size for leaf in jax.tree.leaves(shapes.params)}
    gathered = [
        line.split("=")[1].split("[")[1].split("]")[0] for line in program.splitlines() if " all-gather(" in line
    ]
    assert len(gathered) > 10
    assert all(int(np.prod([int(n) for n in shape.split(",")])) in sizes for shape in gathered)
    assert "all-to-all" not in program


def test_everything_at_once_under_every_engine(tiny, begin, batches):
    """Accumulation, recomputation, clipping, running average and bfloat16."""
    config = tiny(**EVERYTHING)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=True, dtype="bfloat16"))
    found = []
    for changes in (
        {"engine": "pmap", "devices": 2},
        {"engine": "jit", "devices": 2},
        {"engine": "fsdp", "devices": 2},
    ):
        engine = build(config, **changes)
        state, losses = steps(engine, engine.put_state(begin(config)), batches(3))
        found.append((losses, jax.device_get((state.params, state.average))))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(found[0][1]))
    for losses, weights in found[1:]:
        np.testing.assert_allclose(losses, found[0][0], rtol=1e-2)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-2 * largest), weights, found[0][1])


LAYOUTS = [
    {"engine": "fsdp", "devices": 8},
    {"engine": "pmap", "devices": 2},
    {"engine": "fsdp", "devices": 4, "fsdp": 2},
    {"engine": "jit", "devices": 8},
]


def test_a_checkpoint_goes_from_any_engine_to_any_other(tmp_path, tiny):
    """Handed from one to the next, the state stays what it was, bit for bit."""
    config = tiny(ema_decay=0.9)
    expected, shapes = jax.device_get(jax.jit(lambda: init_state(config))()), state_shapes(config)
    state = None
    for step, changes in enumerate(LAYOUTS, 1):
        engine = build(config, **changes)
        with contextlib.closing(Checkpoints(tmp_path, config)) as checkpoints:
            warnings = []
            state = checkpoints.restore_latest(shapes, engine.shardings(shapes), warnings.append)
            state = engine.put_state(expected) if state is None else state
            assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, state, engine.shardings(state)))
            jax.tree.map(np.testing.assert_array_equal, state, expected)
            checkpoints.save(step, state)
            assert warnings == []
        jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path)[1], expected.average)
