"""A checkpoint comes back bit for bit, or is known to be broken."""

import contextlib
import dataclasses
import gc
import shutil
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mae_jax.config import TransformerConfig
from mae_jax.errors import StatedError
from mae_jax.train.checkpoint import BROKEN, Checkpoints, _quiet_threads, fingerprint, load_params
from mae_jax.train.engines import pmap_engine
from mae_jax.train.steps import make_step
from tests.train.conftest import TINY

STEPS = (2, 4, 6)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def engine_on(config, count):
    return pmap_engine(
        lambda axis: make_step(config, steps_per_epoch=4.0, epochs=10.0, axis_name=axis),
        jax.local_devices()[:count],
        config.batch_size,
        config.accumulate,
    )


def on_one():
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def state_at(state, step):
    """A state of a run's length whose every number is another one, also in EMA and in the optimizer."""
    rng = np.random.default_rng(step)

    def draw(leaf):
        values = rng.normal(size=leaf.shape) if leaf.dtype.kind == "f" else np.full(leaf.shape, step)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree.map(draw, state)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, begin):
    """A folder with three checkpoints, and the states that they hold."""
    # The fixture `tiny` is remade for each test; a session's needs its own.
    config = dataclasses.replace(TINY, optim=dataclasses.replace(TINY.optim, ema_decay=0.5), keep=len(STEPS))
    workdir = tmp_path_factory.mktemp("run")
    states = {step: state_at(begin(config), step) for step in STEPS}
    with contextlib.closing(Checkpoints(workdir, config)) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state)
    return config, workdir, states


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of it, to be broken."""
    config, workdir, states = finished_run
    shutil.copytree(workdir, tmp_path / "run")
    return config, tmp_path / "run", states


def test_a_run_with_cudnn_is_read_where_there_is_none(tmp_path, begin):
    wide = TransformerConfig(width=16, depth=1, heads=2)
    plain = dataclasses.replace(TINY.model, dtype="bfloat16", encoder=wide, decoder=wide)
    state = begin(dataclasses.replace(TINY, model=plain))
    recorded = dataclasses.replace(TINY, model=dataclasses.replace(plain, attention="cudnn"))
    with contextlib.closing(Checkpoints(tmp_path, recorded)) as checkpoints:
        checkpoints.save(1, state)
    config, params, _ = load_params(tmp_path)
    assert config.model == plain
    assert_same_bits(params, state.params)


def assert_same_bits(found, expected):
    paths = jax.tree.leaves_with_path(expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, wanted), leaf in zip(paths, jax.tree.leaves(found), strict=True):
        assert (leaf.dtype, leaf.shape) == (wanted.dtype, wanted.shape), path
        assert np.asarray(leaf).tobytes() == np.asarray(wanted).tobytes(), path


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


def largest_file(folder):
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def cut(folder):
    file = largest_file(folder / "state")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def delete(folder):
    """All files of data, whatever they are called; which of them holds which array is Orbax's affair."""
    for file in (folder / "state").rglob("d/*"):
        file.unlink()


def flip(folder):
    file = largest_file(folder / "state")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0b100
    file.write_bytes(data)


def delete_record(folder):
    shutil.rmtree(folder / "record")


def empty(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def another_state(folder):
    """All is well formed, but these are the numbers of another step."""
    shutil.rmtree(folder / "state")
    shutil.copytree(folder.parent / "2" / "state", folder / "state")


DAMAGE = [cut, delete, flip, delete_record, empty, another_state]


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


def test_parameters_of_a_run_and_of_one_checkpoint(run):
    """Of a run that keeps one, the running average."""
    config, workdir, states = run
    for given, step in {workdir: 6, workdir / "checkpoints" / "4": 4}.items():
        found_config, params, found_step = load_params(given)
        assert (found_config, found_step) == (config, step)
        assert_same_bits(params, states[step].average)


def test_parameters_of_a_run_without_an_average(tmp_path, tiny, begin):
    config = tiny()
    state = state_at(begin(config), 3)
    with contextlib.closing(Checkpoints(tmp_path, config)) as checkpoints:
        checkpoints.save(3, state)
    assert_same_bits(load_params(tmp_path)[1], state.params)


@pytest.mark.parametrize("damage", [cut, delete, flip, delete_record, empty], ids=lambda damage: damage.__name__)
def test_parameters_of_a_broken_checkpoint_are_refused(run, damage, caplog):
    _, workdir, _ = run
    folder = workdir / "checkpoints" / "4"
    damage(folder)
    with pytest.raises(StatedError, match=rf"{folder}.* (cannot be read|nor a checkpoint)"):
        load_params(folder)
    gc.collect()
    assert caplog.records == []  # what failed beside the first read does not speak up later


LEFT_BEHIND = """
async def read(waiting):
    try:
        await waiting
    except BaseException as error:  # its own end too, as Orbax does
        raise Exception("while reading") from error
"""


def test_reads_that_are_left_behind_are_not_reported(monkeypatch):
    """What Orbax waits for when its loop is closed; a coroutine of anyone else is reported as ever."""
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(unraisable.object.cr_code))
    files = [f"{Path(ocp.__file__).parent}/serialization.py", "elsewhere.py"]
    with _quiet_threads():
        for file in files:
            scope = {}
            exec(compile(LEFT_BEHIND, file, "exec"), scope)
            left = scope["read"](never())
            left.send(None)  # until it waits
            del left
    assert [code.co_filename for code in reported] == files[1:]


@types.coroutine
def never():
    """Waits for ever."""
    yield


def test_a_fingerprint_sees_every_single_bit():
    values = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    before = fingerprint({"a": jnp.asarray(values)})
    for index in range(15):
        for bit in (0, 13, 31):
            bits = values.copy().view(np.uint32)
            bits.flat[index] ^= np.uint32(1 << bit)
            assert fingerprint({"a": jnp.asarray(bits.view(np.float32))}) != before
    swapped = values.copy()
    swapped[0, 0], swapped[0, 1] = values[0, 1], values[0, 0]
    assert fingerprint({"a": jnp.asarray(swapped)}) != before
    assert fingerprint({"a": jnp.asarray(values)}) == before
