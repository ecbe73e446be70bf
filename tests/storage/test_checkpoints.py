"""A checkpoint comes back bit for bit, or is known to be broken."""

import contextlib
import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.errors import StatedError
from mae_jax.storage.checkpoints import BROKEN, Checkpoints
from mae_jax.train.engines import pmap_engine
from mae_jax.train.step import make_step
from tests.storage.saved_runs import DAMAGE, STEPS, assert_same_bits, flip


def engine_on(config, count):
    return pmap_engine(
        lambda axis: make_step(config, steps_per_epoch=4.0, epochs=10.0, axis_name=axis),
        jax.local_devices()[:count],
        config.batch_size,
        config.accumulate,
    )


def on_one():
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def restore(config, workdir, like, sharding=None):
    """The state restored, what was warned of, and the steps that are left."""
    said = []
    with contextlib.closing(Checkpoints(workdir, config)) as checkpoints:
        state = checkpoints.restore_latest(like, sharding or on_one(), said.append)
        return state, said, checkpoints.steps()


def test_the_newest_comes_back_bit_for_bit(run):
    config, workdir, states = run
    state, said, steps = restore(config, workdir, states[2])
    assert_same_bits(state, states[6])
    assert (said, steps) == ([], [2, 4, 6])


def test_an_empty_folder_has_nothing_to_restore(tmp_path, run):
    config, _, states = run
    assert restore(config, tmp_path / "new", states[2]) == (None, [], [])


@pytest.mark.parametrize("special", [np.nan, np.inf, -0.0, 1e-42])
def test_numbers_of_every_kind_come_back(tmp_path, tiny, special):
    state = {
        "step": jnp.int32(1),
        "params": jnp.asarray([special, 1.0], jnp.float32),
        "half": jnp.ones(3, jnp.bfloat16),
    }
    with contextlib.closing(Checkpoints(tmp_path, tiny())) as checkpoints:
        checkpoints.save(1, state)
    assert_same_bits(restore(tiny(), tmp_path, jax.tree.map(jnp.zeros_like, state))[0], state)


def test_saving_a_step_again_changes_nothing(run):
    config, workdir, states = run
    with contextlib.closing(Checkpoints(workdir, config)) as checkpoints:
        checkpoints.save(6, states[2])
    assert_same_bits(restore(config, workdir, states[2])[0], states[6])


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"), [(1, None, [7]), (2, None, [6, 7]), (2, 3, [3, 6, 7]), (1, 2, [2, 4, 6, 7])]
)
def test_which_checkpoints_are_kept(tmp_path, tiny, keep, keep_every, left):
    config = tiny(keep=keep, keep_every=keep_every, save_every=1)
    with contextlib.closing(Checkpoints(tmp_path, config)) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, {"step": jnp.int32(step)})
    with contextlib.closing(Checkpoints(tmp_path, config)) as checkpoints:
        assert checkpoints.steps() == left
        assert all(checkpoints.path(step).is_dir() for step in left)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_broken_newest_is_skipped_loudly_and_moved_aside(run, damage):
    config, workdir, states = run
    damage(workdir / "checkpoints" / "6")
    state, said, steps = restore(config, workdir, states[2])
    assert_same_bits(state, states[4])
    assert len(said) == 1
    assert said[0].startswith(f"checkpoint {workdir / 'checkpoints' / '6'} is broken and skipped (")
    assert steps == [2, 4]
    assert len(list((workdir / BROKEN).iterdir())) == 1
    # The step can be saved again, and is found by the next.
    with contextlib.closing(Checkpoints(workdir, config)) as checkpoints:
        checkpoints.save(6, states[6])
    state, said, _ = restore(config, workdir, states[2])
    assert_same_bits(state, states[6])
    assert said == []


def test_where_all_are_broken_nothing_is_lost(run):
    config, workdir, states = run
    for step in STEPS:
        flip(workdir / "checkpoints" / str(step))
    said = []
    with contextlib.closing(Checkpoints(workdir, config)) as checkpoints:
        with pytest.raises(StatedError, match=r"none of the 3 checkpoints in .* can be read .*--workdir"):
            checkpoints.restore_latest(states[2], on_one(), said.append)
        assert checkpoints.steps() == list(STEPS)
    assert len(said) == 3
    assert not (workdir / BROKEN).exists()


def test_what_a_save_has_written_goes_where_it_fails(tmp_path, tiny, monkeypatch):
    config = tiny()
    with contextlib.closing(Checkpoints(tmp_path, config)) as checkpoints:
        checkpoints.save(1, {"step": jnp.int32(1)})

    def full(*args, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mae_jax.storage.checkpoints._Write.result", full)
    checkpoints = Checkpoints(tmp_path, config)
    checkpoints.save(2, {"step": jnp.int32(2)})
    with pytest.raises(StatedError, match=r"No space left on device\. Make room .* it continues from step 1\.$"):
        checkpoints.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_a_state_of_another_shape_is_not_restored(run):
    config, workdir, states = run
    other = states[2]._replace(average=None)
    with contextlib.closing(Checkpoints(workdir, config)) as checkpoints, pytest.raises(StatedError, match="none of"):
        checkpoints.restore_latest(other, on_one(), lambda text: None)


def test_a_run_goes_on_with_another_number_of_devices(tmp_path, tiny, begin, batches):
    config, given = tiny(), batches(4)
    two, four = engine_on(config, 2), engine_on(config, 4)
    state = two.place(begin(config))
    for batch in given[:2]:
        state, _ = two.step(state, two.put(batch))
    with contextlib.closing(Checkpoints(tmp_path, config)) as checkpoints:
        checkpoints.save(2, state)
        saved = jax.device_get(state)
        losses = []
        for batch in given[2:]:  # the state is donated while it is being written
            state, metrics = two.step(state, two.put(batch))
            losses.append(float(metrics.loss))

    state, _, _ = restore(config, tmp_path, begin(config), four.layout(begin(config)))
    assert_same_bits(state, saved)
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(state)} == {4}
    for batch, loss in zip(given[2:], losses, strict=True):
        state, metrics = four.step(state, four.put(batch))
        np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
