"""Checkpoints, of a run and of parameters alone; this file and loading.py, which reads parameters, know Orbax.

A checkpoint is a folder: `state`, which Orbax writes; `record`, its metadata (see workdir.py); and checksums.json, the
size and CRC-32 of each file. It has its name only when all of it is on the disk. Orbax's CheckpointManager is not
used: it lists steps whose write has failed, skips those below the highest number without a word, and keeps a process
for five minutes where it cannot make a folder. Its AsyncCheckpointer has none of that.

Of Orbax 1 (ocp.v1, "not before late 2026"): `save_pytree_async`, `load_pytree` and `checkpointables` take the place of
AsyncCheckpointer, Checkpointer and the composite handler; `Context` that of the options here; handlers' `finalize`, in
which files are summed and synced, has no counterpart yet.
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from orbax.checkpoint.utils import TMP_DIR_SUFFIX

from mae_jax.config import Run
from mae_jax.errors import StatedError
from mae_jax.files import Hold, read_json, sync, sync_tree, write_atomically
from mae_jax.hosts import ALONE, Hosts, collective_failure
from mae_jax.models import Params
from mae_jax.storage.checksums import HASHED, SUMMED, altered, file_checksums, fingerprint
from mae_jax.storage.workdir import (
    CHECKPOINTS,
    RECORD,
    checkpoint_folders,
    config_to_dict,
    numbered,
    read_record,
    unwritable,
)

Tree = TypeVar("Tree")

BROKEN = "broken-checkpoints"
BEST = "best"
CHECKSUMS = "checksums.json"
INODES = 40  # files and folders of a checkpoint, on one host

# Folders are made before a save goes on in the background. A thread that waits for one that cannot be made would
# keep the process for 299 s.
_IN_ORDER = ocp.AsyncOptions(create_directories_asynchronously=False)


class DamagedError(StatedError):
    """A checkpoint is not what was written: files are missing, cut short or altered. Reading it again does not help."""


class _Handler(ocp.CompositeCheckpointHandler):
    """Writes `state` and `record`, sums up their files, and has all on the disk before the folder gets its name."""

    def __init__(self) -> None:
        items = ocp.handlers.DefaultCheckpointHandlerRegistry()
        items.add("state", ocp.args.StandardSave, ocp.StandardCheckpointHandler())
        items.add(RECORD, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        super().__init__(handler_registry=items, composite_options=ocp.CompositeOptions(async_options=_IN_ORDER))

    def finalize(self, directory: Any) -> None:
        """Complete a checkpoint that has all its files; Orbax renames its folder after this."""
        super().finalize(directory)
        folder = Path(directory)
        sums = {name: found for item in ("state", RECORD) for name, found in file_checksums(folder, item).items()}
        write_atomically(folder / CHECKSUMS, json.dumps(sums))
        sync_tree(folder)


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
class _Contents(ocp.args.Composite):
    """What `_Handler` writes."""


@contextlib.contextmanager
def _logged_once() -> Iterator[None]:
    """Leave out of absl's log what Orbax logs of a failure that it also raises."""

    def fresh(record: logging.LogRecord) -> bool:
        return not record.exc_info

    logger = logging.getLogger("absl")
    logger.addFilter(fresh)
    try:
        yield
    finally:
        logger.removeFilter(fresh)


def _reason(error: BaseException) -> str:
    """Give the system's word for a failure where there is one, which Orbax and TensorStore wrap in long texts."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))
    words = os.strerror(int(code[1])) if code else next(iter(str(error).splitlines()), "")
    return words[:300] if code else f"{type(error).__name__}: {words[:300]}"


def unread(error: Exception) -> str:
    """Say why a checkpoint was not read, whatever raised it."""
    return str(error) if isinstance(error, StatedError) else _reason(error)


def _check_room(folder: Path, tree: Any) -> None:
    """Raise OSError where a checkpoint cannot be written: in the middle of it, TensorStore reports for each array."""
    os.utime(folder)  # a read-only disk, or no permission
    needed = 0.8 * sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # compressed it may be a little smaller
    disk = os.statvfs(folder)  # which says 0 of 0 where it does not know
    if (disk.f_blocks and disk.f_bfree * disk.f_frsize < needed) or (disk.f_files and disk.f_ffree < INODES):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _fingerprint_version(folder: Path) -> int:
    """Read by which version a checkpoint's fingerprint was taken, and nothing else of its record.

    Raises:
      StatedError: there is no such record.
      OSError: it cannot be read now.
    """
    record = read_json(folder / RECORD / "metadata", RECORD)
    if not isinstance(record, dict) or not isinstance(record.get("fingerprint"), dict):
        raise StatedError(f"checkpoint {folder} has no record of its arrays", field=RECORD)
    return record.get("version") or SUMMED


def check_files(folder: Path) -> None:
    """Read all files of a checkpoint, and compare them with its checksums, which version 0.1.0 did not write.

    Raises:
      DamagedError: one is missing or altered.
      OSError: one cannot be read now, which is no damage.
    """
    try:
        found = file_checksums(folder)
        version = HASHED if CHECKSUMS in found else _fingerprint_version(folder)
        expected = {} if version == SUMMED else read_json(folder / CHECKSUMS)
    except (StatedError, FileNotFoundError, NotADirectoryError) as error:
        raise DamagedError(str(error), field="checkpoint") from error
    wrong = [name for name, sums in dict(expected).items() if found.get(name) != sums]
    if wrong:
        how = "altered" if wrong[0] in found else "missing"
        raise DamagedError(f"{len(wrong)} files are not what was written: {wrong[0]} is {how}", field="checkpoint")


def _abstract(tree: Tree, layout: Any) -> Tree:
    """Give shapes their shardings; `layout` is one sharding for all, or a tree of them."""
    layout = jax.tree.broadcast(layout, tree, is_leaf=lambda x: isinstance(x, Sharding))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, layout)


def _contents(state: Any, metadata: dict[str, Any]) -> _Contents:
    record = metadata | {"fingerprint": fingerprint(state), "version": HASHED}
    return _Contents(state=ocp.args.StandardSave(state), **{RECORD: ocp.args.JsonSave(record)})


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and every multiple of `keep_every` steps.

    On several hosts all of them make one of these, and call the same methods in the same order.

    Close it, or use it in a `with`, or the save under way is lost.
    """

    def __init__(
        self, workdir: Path, config: Run, examples: int | None = None, hosts: Hosts = ALONE, held: Hold | None = None
    ) -> None:
        """Clear away what saves that were cut off have left; `held`: what holds the folder for this run alone."""
        self.folder = workdir / CHECKPOINTS
        self._config, self._hosts, self._held = config, hosts, held
        self._metadata = {"config": config_to_dict(config), "examples": examples}
        self._logged_once = contextlib.ExitStack()
        self._saving: int | None = None  # the step whose save is under way
        self._writer = ocp.AsyncCheckpointer(_Handler(), async_options=_IN_ORDER)
        if hosts.first:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise unwritable(str(workdir), error) from error
            self._clear_unfinished()

    def steps(self) -> list[int]:
        """List the steps that are saved, oldest first, after the save under way."""
        self.wait()
        return [int(folder.name) for folder in checkpoint_folders(self.folder.parent)]

    def path(self, step: int) -> Path:
        """Give the folder of one checkpoint."""
        return self.folder / str(step)

    def save(self, step: int, state: Any) -> None:
        """Start to write a checkpoint; the state may be donated as soon as this returns.

        Raises:
          StatedError: this one or the one before cannot be written, or there is another of this step.
        """
        self.wait()
        contents = _contents(state, self._metadata | {"step": step})
        with self._writing():
            if self.path(step).exists():
                if read_record(self.path(step)).fingerprint == contents[RECORD].item["fingerprint"]:
                    return
                raise StatedError(
                    f"checkpoint {self.path(step)} is there, with other contents than this run has after step {step}, "
                    "and is not replaced: run the same command again to go on from it, or move it out of this folder "
                    "first, to go on from the one before.",
                    field="workdir",
                )
            if self._hosts.first:
                if self._held is not None:
                    self._held.check()
                _check_room(self.folder, state)
            self._logged_once.enter_context(_logged_once())
            self._writer.save(self.path(step), args=contents)
            self._saving = step

    def wait(self) -> None:
        """Wait for the save under way, until it is on the disk; then remove the checkpoints that are not kept.

        Raises:
          StatedError: it cannot be written.
        """
        if self._saving is None:
            return
        with self._writing(), self._logged_once:
            step, self._saving = self._saving, None
            self._writer.wait_until_finished()
            if self._hosts.first:
                sync(self.folder)
                self._remove_old(step)

    def _remove_old(self, newest: int) -> None:
        every = self._config.keep_every
        for step in [step for step in self.steps() if step <= newest][: -self._config.keep]:
            if every is None or step % every:
                # One that is half removed must not look like a checkpoint.
                self.path(step).rename(unfinished := self.folder / f"{step}{TMP_DIR_SUFFIX}")
                shutil.rmtree(unfinished)

    def _clear_unfinished(self) -> None:
        for unfinished in self.folder.glob(f"*{TMP_DIR_SUFFIX}*"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def restore_latest(self, like: Tree, layout: Any, warn: Callable[[str], None]) -> Tree | None:
        """Restore the newest checkpoint that is whole, in the shape of `like`; None where there is none.

        layout: the sharding of all arrays, or a tree of them. It need not be the one that the checkpoint was written
        with. Damaged ones are named through `warn`, and moved aside so that their steps can be saved again.

        Raises:
          StatedError: one cannot be read for another reason than damage; nothing is moved then.
        """
        abstract, broken, state = _abstract(like, layout), [], None
        found = [int(folder.name) for folder in numbered(self.folder.parent)]
        for step in reversed(json.loads(self._hosts.gather("checkpoints", json.dumps(found))[0])):
            try:
                state = self._restore(step, abstract)
                break
            except DamagedError as error:
                broken.append(step)
                warn(f"checkpoint {self.path(step)} is broken and skipped ({error})")
        if broken and state is None:
            warn(f"no checkpoint in {self.folder} is whole: the run begins anew")
        self.move_aside(broken)
        return state

    def _restore(self, step: int, abstract: Tree) -> Tree:
        """Restore one checkpoint; where a host fails, all fail alike.

        Raises:
          DamagedError: it is not what was written.
          StatedError: it cannot be read for another reason.
        """
        folder, failure = self.path(step), None
        state: Any = None
        try:
            if self._hosts.first:
                check_files(folder)
            record = read_record(folder)
            if record.step not in (None, step):
                raise DamagedError(f"it is the checkpoint of step {record.step}", field="checkpoint")
            with self._reader() as reader, _damage_of_old(record.version):
                state = reader.restore(folder / "state", args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # whatever Orbax and its layers raise
            failure = isinstance(error, DamagedError), unread(error)
        answers = self._hosts.gather(f"restored {step}", json.dumps(failure))
        failures = sorted((answer for answer in map(json.loads, answers) if answer), reverse=True)  # damage first
        if failures:
            damaged, why = failures[0]
            if damaged:
                raise DamagedError(why, field="checkpoint")
            raise StatedError(
                f"checkpoint {folder} cannot be read, though it is not damaged: {why}. Nothing was moved; run the same "
                "command again when it can be read.",
                field="checkpoint",
            )
        if wrong := altered(state, record.fingerprint, record.version):
            raise DamagedError(wrong, field="checkpoint")
        return state

    def _reader(self) -> ocp.Checkpointer:
        """Read on each host by itself: with one that fails, the others do not wait for it inside Orbax."""
        alone = ocp.options.MultiprocessingOptions(
            primary_host=self._hosts.index,
            active_processes={self._hosts.index},
            barrier_sync_key_prefix=f"host{self._hosts.index}",
        )
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
        return ocp.Checkpointer(handler, multiprocessing_options=alone)

    def move_aside(self, steps: list[int]) -> None:
        """Take checkpoints out of the run, to lie in broken-checkpoints/."""
        if not steps:
            return
        self.wait()
        if self._hosts.first:
            aside = self.folder.parent / BROKEN
            try:
                aside.mkdir(exist_ok=True)
                for step in steps:
                    self.path(step).rename(aside / f"{step}-{len(list(aside.iterdir()))}")
            except OSError as error:
                raise unwritable(str(aside.parent), error) from error
        self._hosts.gather(f"moved aside {steps}", "")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except StatedError:
            raise
        except Exception as error:  # whatever a disk makes Orbax and its layers raise
            if self._hosts.count > 1 and (failed := collective_failure(error)) is not None:
                raise failed from error  # another host is gone, which `hosts.joined` explains; no disk is at fault
            if self._hosts.count == 1:  # no other host writes: what takes up a full disk may go
                self._clear_unfinished()
            saved = self.steps()
            start = f"from step {saved[-1]}" if saved else "from the beginning"
            raise StatedError(
                f"a checkpoint cannot be written into {self.folder}: {_reason(error)}. Make room there, or make it "
                f"writable, and run the same command again: it continues {start}.",
                field="workdir",
            ) from error

    def close(self) -> None:
        """Wait for the save under way.

        Raises:
          StatedError: it cannot be written.
        """
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # of a failure that was raised before
                self._writer.close()
            self._logged_once.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it, but where another host may be gone, which the save under way would wait for inside Orbax."""
        if self._hosts.count == 1 or error is None or isinstance(error, StatedError):
            self.close()


@contextlib.contextmanager
def _damage_of_old(version: int) -> Iterator[None]:
    """Take a failure for damage where there are no checksums that would have shown it, unless memory has run out."""
    try:
        yield
    except Exception as error:
        if version != SUMMED or isinstance(error, MemoryError | OSError) or "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise DamagedError(_reason(error), field="checkpoint") from error


class Exported(NamedTuple):
    """What a checkpoint without a run behind it holds; its names are those of TrainState."""

    params: Params


def save_params(path: Path, config: Run, params: Params) -> None:
    """Write parameters, of the whole model or of its encoder alone, as a checkpoint that `loading.load_params` reads.

    Raises:
      OSError, ValueError: it cannot be written, or there is something.
    """
    contents = _contents(Exported(jax.tree.map(jnp.asarray, params)), {"config": config_to_dict(config)})
    path = path.absolute()
    with _logged_once(), ocp.Checkpointer(_Handler()) as writer:
        writer.save(path, args=contents)
    sync(path.parent)


def drop_later(workdir: Path, step: int, hosts: Hosts, held: Hold | None) -> None:
    """Remove what a run kept after the step from which it goes on: it may come out otherwise. All hosts call this.

    Raises:
      StatedError: the folder is no longer held for this run.
    """
    if hosts.first:
        if held is not None:
            held.check()
        for saved in checkpoint_folders(workdir / BEST):
            if int(saved.name) > step:
                shutil.rmtree(saved)
    hosts.gather(f"best from {step}", "")


def save_best(workdir: Path, step: int, config: Run, params: Params, hosts: Hosts, held: Hold | None) -> None:
    """Write parameters to WORKDIR/best, which commands take as they take a run; the one before goes then.

    On several hosts all of them call this.

    Raises:
      StatedError: it cannot be written, or the folder is no longer held for this run.
    """
    folder = workdir / BEST
    if any(int(saved.name) == step for saved in checkpoint_folders(folder)):
        return  # by the same run, which was stopped after it
    try:
        if hosts.first:
            if held is not None:
                held.check()
            (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            _check_room(folder, params)
        save_params(folder / CHECKPOINTS / str(step), config, params)
        hosts.gather(f"best {step}", "")
        if hosts.first:
            for saved in checkpoint_folders(folder):
                if int(saved.name) != step:
                    shutil.rmtree(saved)
    except (OSError, ValueError) as error:
        raise StatedError(
            f"the best checkpoint cannot be written into {folder}: {_reason(error)}. Make room there, and run the same "
            "command again.",
            field="workdir",
        ) from error
