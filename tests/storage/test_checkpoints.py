"""A checkpoint comes back bit for bit, or is known to be broken."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mae_jax.files import hold
from mae_jax.hosts import Hosts
from mae_jax.storage.checkpoints import BROKEN, CHECKSUMS, Checkpoints, DamagedError, drop_later, save_best
from mae_jax.train.engines import pmap_engine
from mae_jax.train.step import make_step
from tests.refusals import refused
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
    warned = []
    with contextlib.closing(Checkpoints(workdir, config)) as checkpoints:
        state = checkpoints.restore_latest(like, sharding or on_one(), warned.append)
        return state, warned, checkpoints.steps()


def test_the_newest_comes_back_bit_for_bit(run):
    config, workdir, states = run
    state, warned, steps = restore(config, workdir, states[2])
    assert_same_bits(state, states[6])
    assert (warned, steps) == ([], [2, 4, 6])


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
    """Where it is another state, that is an error: what is not saved is not taken for saved."""
    config, workdir, states = run
    with contextlib.closing(Checkpoints(workdir, config)) as checkpoints:
        checkpoints.save(6, states[6])
        with refused("workdir", "6 is there, with other contents", "go on from it, or move it out") as caught:
            checkpoints.save(6, states[2])
    assert "Make room" not in str(caught.value)  # no disk is at fault
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
    state, warned, steps = restore(config, workdir, states[2])
    assert_same_bits(state, states[4])
    assert len(warned) == 1
    assert warned[0].startswith(f"checkpoint {workdir / 'checkpoints' / '6'} is broken and skipped (")
    assert steps == [2, 4]
    assert len(list((workdir / BROKEN).iterdir())) == 1
    # The step can be saved again, and is found by the next.
    with contextlib.closing(Checkpoints(workdir, config)) as checkpoints:
        checkpoints.save(6, states[6])
    state, warned, _ = restore(config, workdir, states[2])
    assert_same_bits(state, states[6])
    assert warned == []


def test_where_all_are_broken_the_run_begins_anew(run):
    """They are moved aside, and one word more is given than for each of them."""
    config, workdir, states = run
    for step in STEPS:
        flip(workdir / "checkpoints" / str(step))
    state, warned, steps = restore(config, workdir, states[2])
    assert (state, steps) == (None, [])
    assert len(warned) == 4
    assert warned[3] == f"no checkpoint in {workdir / 'checkpoints'} is whole: the run begins anew"
    assert sorted(path.name for path in (workdir / BROKEN).iterdir()) == ["2-2", "4-1", "6-0"]


def test_young_files_that_a_power_cut_emptied_are_damage(run):
    config, workdir, states = run
    for folder in (workdir / "checkpoints").iterdir():
        for file in (path for path in folder.rglob("*") if path.is_file()):
            os.truncate(file, 0)
    state, warned, _ = restore(config, workdir, states[2])
    assert state is None
    assert len(warned) == 4


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), OSError(errno.EACCES, "Permission denied"), MemoryError()]
)
@pytest.mark.parametrize("where", ["mae_jax.storage.checksums._crc32", "orbax.checkpoint.Checkpointer.restore"])
def test_what_is_no_damage_stops_the_run_and_moves_nothing(run, monkeypatch, where, error):
    config, workdir, states = run

    def failing(*args, **keywords):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(where, failing)
        with refused("checkpoint", "6 cannot be read, though it is not damaged: "):
            restore(config, workdir, states[2])
    assert not (workdir / BROKEN).exists()
    state, warned, steps = restore(config, workdir, states[2])
    assert_same_bits(state, states[6])
    assert (warned, steps) == ([], [2, 4, 6])


@pytest.mark.parametrize("summed", [True, False])  # version 0.1.0 wrote no sums
def test_a_record_that_may_not_be_read_is_no_damage(run, monkeypatch, summed):
    config, workdir, states = run
    opened = Path.open
    if not summed:
        for file in workdir.rglob(CHECKSUMS):
            file.unlink()

    def denied(path, *args, **keywords):
        if path.name == "metadata":
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *args, **keywords)

    monkeypatch.setattr(Path, "open", denied)
    with refused("checkpoint", "6 cannot be read, though it is not damaged: Permission denied"):
        restore(config, workdir, states[2])
    assert not (workdir / BROKEN).exists()


def test_a_state_of_another_shape_is_no_damage(run):
    config, workdir, states = run
    with refused("checkpoint"):
        restore(config, workdir, states[2]._replace(average=None))
    assert not (workdir / BROKEN).exists()


def test_a_folder_of_a_higher_number_keeps_no_step_from_being_saved(run):
    """One that is empty, and one that is a checkpoint of another step."""
    config, workdir, states = run
    (workdir / "checkpoints" / "500").mkdir()
    shutil.copytree(workdir / "checkpoints" / "2", workdir / "checkpoints" / "400")
    state, warned, _ = restore(config, workdir, states[2])
    assert_same_bits(state, states[6])
    assert len(warned) == 2
    assert "400 is broken and skipped (it is the checkpoint of step 2)" in warned[1]
    (workdir / "checkpoints" / "500").mkdir()  # while the run goes on
    with contextlib.closing(Checkpoints(workdir, config)) as checkpoints:
        for step in (7, 8, 9, 10):
            checkpoints.save(step, states[6])
        assert checkpoints.steps() == [8, 9, 10]


def test_a_save_that_fails_is_neither_listed_nor_in_the_way(tmp_path, tiny, monkeypatch, capfd):
    """Also where it fails at the very end, in the background."""
    config = tiny()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with contextlib.closing(Checkpoints(tmp_path, config)) as checkpoints:
        checkpoints.save(1, {"step": jnp.int32(1)})
        checkpoints.wait()
        for place in ("mae_jax.storage.checkpoints.sync_tree", "os.mkdir", "os.statvfs", "os.utime"):
            with monkeypatch.context() as patch:
                patch.setattr(place, full)
                with refused("workdir", "No space left on device. Make room", "it continues from step 1."):
                    checkpoints.save(2, {"step": jnp.int32(2)})
                    checkpoints.wait()
            assert checkpoints.steps() == [1]
            assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
        checkpoints.save(2, {"step": jnp.int32(2)})
        assert checkpoints.steps() == [1, 2]
    assert capfd.readouterr().err == ""


def test_a_host_that_is_gone_is_no_fault_of_the_disk(tmp_path, tiny, monkeypatch):
    """The others see it in whatever operation of all hosts comes next, which may be one of a save."""
    words = "FAILED_PRECONDITION: Gloo all-reduce failed: Connection reset by peer"
    resets = [jax.errors.JaxRuntimeError(words), ValueError(words)]  # by JAX's version
    full = [OSError(errno.ENOSPC, "No space"), ValueError("UNKNOWN: writing [os_error_code='28']")]
    for hosts, error in [*((Hosts(0, 2), e) for e in (*resets, *full)), (Hosts(), resets[0])]:
        with Checkpoints(tmp_path, tiny(), hosts=hosts) as checkpoints:

            def fail(*args, error=error, **given):
                raise ValueError("as a library may wrap it") from error

            monkeypatch.setattr(checkpoints._writer, "save", fail)
            state = {"x": jnp.zeros(3)}
            if hosts.count > 1 and error in resets:
                with pytest.raises(type(error), match="Connection reset"):
                    checkpoints.save(1, state)
            else:
                with refused("workdir"):
                    checkpoints.save(1, state)


@pytest.fixture
def lost(tmp_path, monkeypatch):
    """What held the folder, which another process has taken since."""
    with hold(tmp_path, "workdir") as held:
        monkeypatch.setattr("mae_jax.files._holder", lambda file: "another")
        yield dataclasses.replace(held, holder="this one")


def test_a_save_that_no_longer_holds_the_folder_is_refused(tmp_path, tiny, lost):
    with (
        contextlib.closing(Checkpoints(tmp_path, tiny(), held=lost)) as checkpoints,
        refused("workdir", "no longer held"),
    ):
        checkpoints.save(1, {"step": jnp.int32(1)})
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_the_best_of_another_is_left_alone(tmp_path, tiny, lost):
    params = {"x": jnp.ones(3)}
    save_best(tmp_path, 4, tiny(), params, Hosts(), None)
    with refused("workdir", "no longer held"):
        drop_later(tmp_path, 2, Hosts(), lost)
    with refused("workdir", "no longer held"):
        save_best(tmp_path, 2, tiny(), params, Hosts(), lost)
    assert [folder.name for folder in (tmp_path / "best" / "checkpoints").iterdir()] == ["4"]


def test_a_checkpoint_has_its_name_only_when_it_is_on_the_disk(tmp_path, tiny, monkeypatch):
    order, fsync, rename = [], os.fsync, os.rename

    def synced(descriptor):
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(source, target, **keywords):
        order.append((Path(source), Path(target)))
        rename(source, target, **keywords)

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr("os.rename", renamed)
    with contextlib.closing(Checkpoints(tmp_path, tiny())) as checkpoints:
        checkpoints.save(1, {"step": jnp.int32(1), "params": jnp.ones(3)})
        checkpoints.wait()
        folder = checkpoints.path(1)
    (commit,) = [at for at, event in enumerate(order) if isinstance(event, tuple) and event[1] == folder]
    before = {path.relative_to(order[commit][0]) for path in order[:commit] if isinstance(path, Path)
              and path.is_relative_to(order[commit][0])}  # fmt: skip
    files = {path.relative_to(folder) for path in folder.rglob("*")}
    assert files - before == {Path("commit_success.txt")}  # Orbax's word to itself, which nothing reads
    assert folder.parent in order[commit:]


def test_what_is_not_kept_goes_only_when_the_next_is_on_the_disk(tmp_path, tiny, monkeypatch):
    config = tiny(keep=1)
    with contextlib.closing(Checkpoints(tmp_path, config)) as checkpoints:
        checkpoints.save(1, {"step": jnp.int32(1)})
        checkpoints.save(2, {"step": jnp.int32(2)})
        monkeypatch.setattr("mae_jax.storage.checkpoints.sync", lambda path: (_ for _ in ()).throw(OSError(5, "EIO")))
        with refused("workdir"):
            checkpoints.wait()
        monkeypatch.undo()
        assert checkpoints.steps() == [1, 2]


@pytest.mark.parametrize("change", ["missing", "cut", "flipped"])
def test_files_are_compared_before_they_are_read(run, monkeypatch, change):
    """Whichever it is: Orbax is not asked, which would leave reads of other arrays behind it."""
    config, workdir, states = run
    folder = workdir / "checkpoints" / "6"
    monkeypatch.setattr(ocp.Checkpointer, "restore", lambda *args, **keywords: pytest.fail("it was read"))
    sums = json.loads((folder / CHECKSUMS).read_text())
    assert sums.keys() >= {"record/metadata", "state/manifest.ocdbt"}
    for name in sums:
        kept = (folder / name).read_bytes()
        if change == "missing":
            (folder / name).unlink()
        elif change == "cut":
            os.truncate(folder / name, len(kept) - 1)
        else:
            (folder / name).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with contextlib.closing(Checkpoints(workdir, config)) as checkpoints, pytest.raises(DamagedError):
            checkpoints._restore(6, states[2])
        (folder / name).write_bytes(kept)


FEW_INODES = """
import sys, time, contextlib
from pathlib import Path
import jax.numpy as jnp
from mae_jax.errors import StatedError
from mae_jax.storage.checkpoints import Checkpoints
from tests.tiny import TINY
checkpoints = Checkpoints(Path(sys.argv[1]), TINY)
try:
    with contextlib.closing(checkpoints):
        checkpoints.save(1, {"step": jnp.int32(1)})
except StatedError as error:
    print(error)
    print(time.time(), flush=True)
"""


@pytest.mark.parametrize("inodes", [2, 3, 30])
def test_a_folder_that_cannot_be_made_holds_up_no_end(tmp_path, inodes):
    """On a disk that has no inodes left, at several moments of a save."""
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size=64m,nr_inodes={inodes}", "none", str(tmp_path / "disk")]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        command = [sys.executable, "-c", FEW_INODES, tmp_path / "disk"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        ended = time.time()
    finally:
        subprocess.run(["umount", "--lazy", tmp_path / "disk"], check=True)
    assert (done.returncode, done.stderr) == (0, "")
    words, failed = done.stdout.splitlines()
    assert "No space left on device" in words
    assert ended - float(failed) < 10  # on a machine that does nothing else 1.1 s; it was 299


def test_a_run_goes_on_with_another_number_of_devices(tmp_path, tiny, begin, batches):
    config, given = tiny(), batches(4)
    two, four = engine_on(config, 2), engine_on(config, 4)
    state = two.put_state(begin(config))
    for batch in given[:2]:
        state, _ = two.step(state, two.put_batch(batch))
    with contextlib.closing(Checkpoints(tmp_path, config)) as checkpoints:
        checkpoints.save(2, state)
        saved = jax.device_get(state)
        losses = []
        for batch in given[2:]:  # the state is donated while it is being written
            state, metrics = two.step(state, two.put_batch(batch))
            losses.append(float(metrics.loss))

    state, _, _ = restore(config, tmp_path, begin(config), four.shardings(begin(config)))
    assert_same_bits(state, saved)
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(state)} == {4}
    for batch, loss in zip(given[2:], losses, strict=True):
        state, metrics = four.step(state, four.put_batch(batch))
        np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
