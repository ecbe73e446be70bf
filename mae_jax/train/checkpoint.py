"""Checkpoints through Orbax: written in the background, whole or not at all, and known to be what was written.

Orbax notices a missing or short file but reads flipped bits as numbers, so each checkpoint records a fingerprint
of every array, and a restored one must have the same.
"""

import contextlib
import gc
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from mae_jax.config import PretrainConfig
from mae_jax.errors import StatedError
from mae_jax.train.steps import Params, init_state
from mae_jax.train.workdir import CHECKPOINTS, RECORD, config_to_dict, find_checkpoint, read_record

Tree = TypeVar("Tree")

BROKEN = "broken-checkpoints"


@jax.jit
def _fingerprints(leaves: list[jax.Array]) -> jax.Array:
    def one(leaf: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(leaf, jnp.uint16 if leaf.dtype.itemsize == 2 else jnp.uint32).ravel()
        odd = 2 * jax.lax.iota(jnp.uint32, words.size) + jnp.uint32(1)
        return jnp.sum(words.astype(jnp.uint32) * odd, dtype=jnp.uint32)

    return jnp.stack([one(leaf) for leaf in leaves])


def fingerprint(tree: Any) -> dict[str, int]:
    """A 32-bit sum of each array's bits, weighted by place: a change of any one 32-bit word changes it."""
    paths, leaves = zip(*jax.tree_util.tree_flatten_with_path(tree)[0], strict=True)
    sums = np.asarray(_fingerprints(list(leaves)))
    return {jax.tree_util.keystr(path): int(value) for path, value in zip(paths, sums, strict=True)}


def _check_fingerprint(tree: Any, recorded: dict[str, int]) -> None:
    wrong = [key for key, value in fingerprint(tree).items() if recorded.get(key) != value]
    if wrong:
        raise ValueError(f"{len(wrong)} arrays are not what was written, {wrong[0]} among them")


@contextlib.contextmanager
def _quiet_readers() -> Iterator[None]:
    """The first read that fails is raised, and nothing is said of those beside it.

    Orbax reads with coroutines: those that fail later are reported by asyncio when they are collected, and those
    that end when the event loop is closed already by the interpreter, from other threads.
    """
    report, late = sys.unraisablehook, []

    def others(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) == "Event loop is closed":
            late.append(unraisable.exc_type)
        else:
            report(unraisable)

    loggers = {name: logging.getLogger(name) for name in ("asyncio", "absl")}
    levels = {name: logger.level for name, logger in loggers.items()}
    try:
        sys.unraisablehook = others
        for logger in loggers.values():
            logger.setLevel(logging.CRITICAL + 1)
        yield
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # they hold the coroutines
        seen = -1
        while seen < len(late):
            seen = len(late)
            time.sleep(0.3)
        raise
    finally:
        gc.collect()
        sys.unraisablehook = report
        for name, logger in loggers.items():
            logger.setLevel(levels[name])


def _abstract(tree: Tree, sharding: jax.sharding.Sharding) -> Tree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and every multiple of `keep_every` steps.

    Close it, or the save under way is lost.
    """

    def __init__(self, workdir: Path, config: PretrainConfig, examples: int | None = None) -> None:
        self.folder = workdir / CHECKPOINTS
        self._said = {"config": config_to_dict(config), "examples": examples}
        policies = [checkpoint_managers.LatestN(config.keep)]
        if config.keep_every is not None:
            policies.append(checkpoint_managers.EveryNSteps(config.keep_every))
        self._manager = ocp.CheckpointManager(
            self.folder,
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
        """Start to write a checkpoint; the state may be donated as soon as this returns."""
        if step in self._manager.all_steps():
            return
        record = self._said | {"fingerprint": fingerprint(state)}
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), **{RECORD: ocp.args.JsonSave(record)})
        )

    def restore_latest(self, like: Tree, sharding: jax.sharding.Sharding, warn: Callable[[str], None]) -> Tree | None:
        """The newest checkpoint that is whole, in the shape of `like`; None where there is none at all.

        Broken ones are named through `warn`, and moved aside so that their steps can be saved again.

        Raises:
          StatedError: there are checkpoints, and every one of them is broken.
        """
        broken: list[tuple[int, str]] = []
        for step in reversed(self.steps()):
            try:
                state = self._restore(step, _abstract(like, sharding))
            except Exception as error:  # whatever a damaged file makes Orbax and its layers raise
                broken.append((step, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"))
                warn(f"checkpoint {self.path(step)} is broken and skipped ({broken[-1][1]})")
                continue
            for bad, _ in broken:
                self.move_aside(bad)
            return state
        if broken:
            raise StatedError(
                f"none of the {len(broken)} checkpoints in {self.folder} can be read (the newest: {broken[0][1]}). "
                "Restore them from elsewhere, or choose another --workdir."
            )
        return None

    def _restore(self, step: int, abstract: Tree) -> Tree:
        with _quiet_readers():
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), **{RECORD: ocp.args.JsonRestore()}),
            )
        _check_fingerprint(restored["state"], restored[RECORD]["fingerprint"])
        return restored["state"]

    def move_aside(self, step: int) -> None:
        """Take a checkpoint out of the run, to lie in broken-checkpoints/."""
        self._manager.wait_until_finished()
        aside = self.folder.parent / BROKEN
        aside.mkdir(exist_ok=True)
        self.path(step).rename(aside / f"{step}-{len(list(aside.iterdir()))}")
        self._manager.reload()

    def close(self) -> None:
        """Wait for the save under way."""
        self._manager.close()


class Exported(NamedTuple):
    """What a checkpoint without a run behind it holds; its names are those of TrainState."""

    params: Params


def save_params(path: Path, config: PretrainConfig, params: Params) -> None:
    """Write parameters, of the whole model or of its encoder alone, as a checkpoint that `load_params` reads."""
    exported = Exported(jax.tree.map(jnp.asarray, params))
    record = {"config": config_to_dict(config), "fingerprint": fingerprint(exported)}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(exported), **{RECORD: ocp.args.JsonSave(record)})
        writer.save(path.absolute(), args=arguments)


def load_params(
    run_or_checkpoint: str | Path, part: Literal["all", "encoder"] = "encoder"
) -> tuple[PretrainConfig, Params, int]:
    """Configuration, parameters (their running average where the run keeps one) and step of a checkpoint.

    The optimizer's state is not read. A checkpoint that was ported may hold the encoder alone; its step is 0.

    Raises:
      StatedError: there is no checkpoint, it cannot be read, or it has no decoder and `part` all asks for one.
    """
    folder = find_checkpoint(run_or_checkpoint)
    config, recorded, _ = read_record(folder)
    try:
        kind = "params" if config.optim.ema_decay is None else "average"
        whole = _abstract(
            jax.eval_shape(lambda: init_state(config)), jax.sharding.SingleDeviceSharding(jax.devices()[0])
        )
        item = {kind: getattr(whole, kind)}
        if not any("['decoder']" in key for key in recorded):
            item[kind] = {"encoder": item[kind]["encoder"]}
        with _quiet_readers(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arguments = ocp.args.PyTreeRestore(
                item=item,
                restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                partial_restore=True,
            )
            params = reader.restore(folder / "state", args=arguments)[kind]
        prefix = jax.tree_util.keystr((jax.tree_util.GetAttrKey(kind),))
        _check_fingerprint(params, {key.removeprefix(prefix): value for key, value in recorded.items()})
    except Exception as error:  # whatever a damaged file makes Orbax and its layers raise
        raise StatedError(f"checkpoint {folder} cannot be read: {type(error).__name__}: {error}") from error
    if part == "all" and "decoder" not in params:
        raise StatedError(f"{run_or_checkpoint} holds an encoder alone, and this needs the decoder too")
    return config, params, int(folder.name) if folder.name.isdigit() else 0
