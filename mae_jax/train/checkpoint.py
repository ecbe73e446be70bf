"""Checkpoints through Orbax: written in the background, whole or not at all, and known to be what was written.

Each records a fingerprint of every array, and a restored one must have the same.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint.utils import TMP_DIR_SUFFIX

from mae_jax.config import RunConfig
from mae_jax.errors import StatedError
from mae_jax.train.fingerprint import check_fingerprint, fingerprint
from mae_jax.train.hosts import Hosts
from mae_jax.train.quiet import quiet_threads, release, silence_late_tasks
from mae_jax.train.workdir import CHECKPOINTS, RECORD, config_to_dict, read_record, unwritable

Tree = TypeVar("Tree")

BROKEN = "broken-checkpoints"
ALONE = Hosts()


@dataclasses.dataclass(frozen=True)
class _Write:
    """A write under way in the background; `failed` is told at once when it fails."""

    write: Any  # of Orbax: result() waits for it
    failed: Callable[[BaseException], None]

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self.write.result(timeout)
        except Exception as error:
            self.failed(error)
            raise


class _StateHandler(ocp.StandardCheckpointHandler):
    """Tells of a write that fails on this host: Orbax would first wait for the others, which wait for this one."""

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        super().__init__()
        self._failed = failed

    async def async_save(self, *args: Any, **settings: Any) -> list[Any]:
        return [_Write(write, self._failed) for write in await super().async_save(*args, **settings) or []]


def _abstract(tree: Tree, layout: Any) -> Tree:
    """Shapes with their shardings; `layout` is one sharding for all, or a tree of them."""
    layout = jax.tree.broadcast(layout, tree, is_leaf=lambda x: isinstance(x, Sharding))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, layout)


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and every multiple of `keep_every` steps; or the newest alone.

    On several hosts all of them make one of these, and call the same methods in the same order.

    Close it, or the save under way is lost.
    """

    def __init__(
        self,
        workdir: Path,
        config: RunConfig,
        examples: int | None = None,
        hosts: Hosts = ALONE,
        newest_only: bool = False,
    ) -> None:
        self.folder = workdir / CHECKPOINTS
        self._said, self._hosts = {"config": config_to_dict(config), "examples": examples}, hosts
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(quiet_threads())
        self._failed = False  # whether a checkpoint could not be written
        self._late_tasks = False  # whether reads that failed may still be reported
        policies = [checkpoint_managers.LatestN(1 if newest_only else config.keep)]
        if config.keep_every is not None and not newest_only:
            policies.append(checkpoint_managers.EveryNSteps(config.keep_every))
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add("state", ocp.args.StandardSave, _StateHandler(self._give_up))
        handlers.add(RECORD, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        self._manager = ocp.CheckpointManager(
            self.folder,
            handler_registry=handlers,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),
                cleanup_tmp_directories=True,
            ),
        )

    def steps(self) -> list[int]:
        """Steps that can be restored, oldest first."""
        return sorted(self._manager.all_steps())

    def path(self, step: int) -> Path:
        """The folder of one checkpoint."""
        return self.folder / str(step)

    def save(self, step: int, state: Any) -> None:
        """Start to write a checkpoint; the state may be donated as soon as this returns.

        Raises:
          StatedError: this one or the one before cannot be written.
        """
        if step in self._manager.all_steps():
            return
        record = self._said | {"fingerprint": fingerprint(state)}
        with self._writing():
            self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), **{RECORD: ocp.args.JsonSave(record)})
            )

    def restore_latest(self, like: Tree, layout: Any, warn: Callable[[str], None]) -> Tree | None:
        """The newest checkpoint that is whole, in the shape of `like`; None where there is none at all.

        layout: the sharding of all arrays, or a tree of them. It need not be the one that the checkpoint was written
        with. Broken ones are named through `warn`, and moved aside so that their steps can be saved again.

        Raises:
          StatedError: there are checkpoints, and every one of them is broken.
        """
        abstract, broken = _abstract(like, layout), []
        for step in reversed(self.steps()):
            try:
                state = self._restore(step, abstract)
            except ValueError as error:
                broken.append((step, str(error)))
                warn(f"checkpoint {self.path(step)} is broken and skipped ({error})")
                continue
            self.move_aside([bad for bad, _ in broken])
            return state
        if broken:
            raise StatedError(
                f"none of the {len(broken)} checkpoints in {self.folder} can be read (the newest: {broken[0][1]}). "
                "Restore them from elsewhere, or choose another --workdir."
            )
        return None

    def _restore(self, step: int, abstract: Tree) -> Tree:
        """The state of one checkpoint.

        Raises:
          ValueError: a host cannot read its part, or what was read is not what was written. On all hosts alike.
        """
        failure, state, recorded = "", None, {}
        try:
            recorded = read_record(self.path(step)).fingerprint
            with self._reader() as reader:
                state = reader.restore(self.path(step) / "state", args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # whatever a damaged file makes Orbax and its layers raise
            failure = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            release(error)
            self._late_tasks = True
        failures = [text for text in self._hosts.gather(f"restored {step}", failure) if text]
        if failures or state is None:
            raise ValueError(failures[0])
        check_fingerprint(state, recorded)
        return state

    def _reader(self) -> ocp.Checkpointer:
        """Each host reads by itself: with one that fails, the others do not wait for it inside Orbax."""
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
        self._manager.wait_until_finished()
        if self._hosts.first:
            aside = self.folder.parent / BROKEN
            try:
                aside.mkdir(exist_ok=True)
                for step in steps:
                    self.path(step).rename(aside / f"{step}-{len(list(aside.iterdir()))}")
            except OSError as error:
                raise unwritable(str(aside.parent), error) from error
        self._hosts.gather(f"moved aside {steps}", "")
        self._manager.reload()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a disk makes Orbax and its layers raise
            self._failed = True
            self._give_up(error)
            release(error)
            raise StatedError(self._why(error)) from error

    def _give_up(self, error: BaseException) -> None:
        """End this host and the others where there are any: they wait for each other inside Orbax."""
        if self._hosts.watch is not None:
            self._hosts.watch.give_up(self._why(error))

    def _why(self, error: BaseException) -> str:
        whole = [int(path.parent.name) for path in self.folder.glob(f"*/{RECORD}") if path.parent.name.isdigit()]
        start = f"from step {max(whole)}" if whole else "from the beginning"
        return (
            f"a checkpoint cannot be written into {self.folder}: {str(error).splitlines()[0][:300]}. "
            f"Make room there, or make it writable, and run the same command again: it continues {start}."
        )

    def close(self) -> None:
        """Wait for the save under way.

        Raises:
          StatedError: it cannot be written.
        """
        try:
            with self._quiet:
                try:
                    with self._writing():
                        self._manager.close()
                finally:
                    del self._manager  # with what is left of a save that failed
        finally:
            if self._failed and self._hosts.count == 1:  # no write is under way: what takes up a full disk may go
                for unfinished in self.folder.glob(f"*{TMP_DIR_SUFFIX}"):
                    shutil.rmtree(unfinished, ignore_errors=True)
        if self._late_tasks:
            silence_late_tasks()
