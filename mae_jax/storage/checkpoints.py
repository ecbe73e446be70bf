"""The best of a run's evaluations, kept as a checkpoint of its own."""

import contextlib
import dataclasses
import gc
import logging
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Sharding, SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint.utils import TMP_DIR_SUFFIX

from mae_jax.config import FinetuneConfig, PretrainConfig, Run
from mae_jax.errors import StatedError
from mae_jax.hosts import Hosts
from mae_jax.models import Params
from mae_jax.storage.checksums import check_fingerprint, fingerprint
from mae_jax.storage.workdir import (
    CHECKPOINTS,
    RECORD,
    checkpoint_folders,
    config_to_dict,
    find_checkpoint,
    read_record,
    unwritable,
)
from mae_jax.train.step import init_state


def release(error: BaseException | None) -> None:
    """Let go of the coroutines that the frames of an error hold; asyncio reports each when it is collected."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _of_no_concern(unraisable: "sys.UnraisableHookArgs") -> bool:
    """Whether it is of a read whose event loop is closed: TensorStore calls the loop, and drops what waited for it.

    What waited is a coroutine of Orbax, which turns even its own end (GeneratorExit) into an error.
    """
    waiting = getattr(unraisable.object, "cr_code", None)
    return str(unraisable.exc_value) == "Event loop is closed" or (
        waiting is not None and waiting.co_filename.startswith(str(Path(ocp.__file__).parent))
    )


@contextlib.contextmanager
def quiet_threads() -> Iterator[None]:
    """The first read or write that fails is raised, and nothing is said of those beside it.

    Orbax reads and writes with coroutines and threads: those that fail later are logged, or reported by asyncio when
    they are collected; those that end when the event loop is closed already by the interpreter, from other threads.
    """
    report, late = sys.unraisablehook, []

    def others(unraisable: "sys.UnraisableHookArgs") -> None:
        if _of_no_concern(unraisable):
            late.append(unraisable.exc_type)
        else:
            report(unraisable)

    loggers = {name: logging.getLogger(name) for name in ("asyncio", "absl")}
    levels = {name: logger.level for name, logger in loggers.items()}
    failed = False
    try:
        sys.unraisablehook = others
        for logger in loggers.values():
            logger.setLevel(logging.CRITICAL + 1)
        yield
    except Exception as error:
        failed = True
        release(error)
        raise
    finally:
        seen = -1 if failed else 0
        while seen < len(late):
            seen = len(late)
            time.sleep(0.3)
        gc.collect()
        sys.unraisablehook = report
        for name, logger in loggers.items():
            logger.setLevel(levels[name])


def silence_late_tasks() -> None:
    """Reads that failed beside another may be collected, and reported, only as the interpreter ends."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)


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
        config: Run,
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


class Exported(NamedTuple):
    """What a checkpoint without a run behind it holds; its names are those of TrainState."""

    params: Params


def save_params(path: Path, config: Run, params: Params) -> None:
    """Write parameters, of the whole model or of its encoder alone, as a checkpoint that `load_params` reads."""
    exported = Exported(jax.tree.map(jnp.asarray, params))
    record = {"config": config_to_dict(config), "fingerprint": fingerprint(exported)}
    with quiet_threads(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(exported), **{RECORD: ocp.args.JsonSave(record)})
        writer.save(path.absolute(), args=arguments)


def load_params(
    run_or_checkpoint: str | Path, part: Literal["all", "encoder"] = "encoder"
) -> tuple[PretrainConfig, Params, int]:
    """Configuration, parameters (their running average where the run keeps one) and step of a pretraining checkpoint.

    The optimizer's state is not read. A checkpoint that was ported may hold the encoder alone; its step is 0.

    Raises:
      StatedError: there is no checkpoint, it cannot be read, it is a classifier's, or it has no decoder and `part`
        all asks for one.
    """
    config, params, step = load_any(run_or_checkpoint)
    if config.kind != "pretraining":
        raise StatedError(f"{run_or_checkpoint} holds a classifier, and this needs a pretraining run")
    if part == "all" and "decoder" not in params:
        raise StatedError(f"{run_or_checkpoint} holds an encoder alone, and this needs the decoder too")
    return config, params, step


def load_classifier(run_or_checkpoint: str | Path) -> tuple[FinetuneConfig, Params, int]:
    """Configuration, parameters (their running average where the run keeps one) and step of a classifier's checkpoint.

    Raises:
      StatedError: there is no checkpoint, it cannot be read, or it is a pretraining run's.
    """
    config, params, step = load_any(run_or_checkpoint)
    if config.kind != "classification":
        raise StatedError(f"{run_or_checkpoint} holds no classifier: it is a pretraining run's")
    return config, params, step


def load_any(run_or_checkpoint: str | Path) -> tuple[Run, Params, int]:
    """The same of either kind. The configuration's attention is xla, whatever the run had.

    Raises:
      StatedError: there is no checkpoint, or it cannot be read.
    """
    folder = find_checkpoint(run_or_checkpoint)
    config, recorded, _ = read_record(folder)
    # A checkpoint is used where it is, which need not be a GPU.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="xla"))
    try:
        kind = "params" if config.optim.ema_decay is None else "average"
        here = SingleDeviceSharding(jax.devices()[0])
        shapes = getattr(jax.eval_shape(lambda: init_state(config)), kind)
        item = {kind: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)}
        if config.kind == "pretraining" and not any("['decoder']" in key for key in recorded):
            item[kind] = {"encoder": item[kind]["encoder"]}
        with quiet_threads(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arguments = ocp.args.PyTreeRestore(
                item=item,
                restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                partial_restore=True,
            )
            params = reader.restore(folder / "state", args=arguments)[kind]
        prefix = jax.tree_util.keystr((jax.tree_util.GetAttrKey(kind),))
        check_fingerprint(params, {key.removeprefix(prefix): value for key, value in recorded.items()})
    except Exception as error:  # whatever a damaged file makes Orbax and its layers raise
        raise StatedError(f"checkpoint {folder} cannot be read: {type(error).__name__}: {error}") from error
    return config, params, int(folder.name) if folder.name.isdigit() else 0


BEST = "best"


def drop_later(workdir: Path, step: int, hosts: Hosts) -> None:
    """Remove what a run kept after the step from which it goes on: it may come out otherwise. All hosts call this."""
    if hosts.first:
        for saved in checkpoint_folders(workdir / BEST):
            if int(saved.name) > step:
                shutil.rmtree(saved)
    hosts.gather(f"best from {step}", "")


def save_best(workdir: Path, step: int, config: Run, params: Params, hosts: Hosts) -> None:
    """Write parameters to WORKDIR/best, which commands take as they take a run; the one before goes then.

    On several hosts all of them call this.

    Raises:
      StatedError: it cannot be written.
    """
    folder = workdir / BEST
    if any(int(saved.name) == step for saved in checkpoint_folders(folder)):
        return  # by the same run, which was stopped after it
    try:
        save_params(folder / CHECKPOINTS / str(step), config, params)
        hosts.gather(f"best {step}", "")
        if hosts.first:
            for saved in checkpoint_folders(folder):
                if int(saved.name) != step:
                    shutil.rmtree(saved)
    except (OSError, ValueError) as error:
        if hosts.watch is not None:
            hosts.watch.let_the_gone_be_named()
        raise StatedError(
            f"the best checkpoint cannot be written into {folder}: {str(error).splitlines()[0][:300]}. "
            "Make room there, and run the same command again."
        ) from error
