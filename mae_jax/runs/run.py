"""One run, from its configuration to its last checkpoint: the room where everything meets."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.errors import JaxRuntimeError

from mae_jax.config import PretrainConfig, RunConfig
from mae_jax.data.sources.source import Source
from mae_jax.errors import StatedError
from mae_jax.hosts import Hosts
from mae_jax.runs.initial import Say, start_from
from mae_jax.runs.log import RunLog, SilentLog
from mae_jax.runs.loop import Finished, Loop, Watch
from mae_jax.runs.stop import StopRequest
from mae_jax.storage.agreement import check_agreement, claim_together
from mae_jax.storage.checkpoints import Checkpoints
from mae_jax.storage.workdir import find_checkpoint
from mae_jax.train.build import Length, build_engine, run_length
from mae_jax.train.engines import Engine
from mae_jax.train.step import TrainState, init_state, make_objective, select


@contextmanager
def too_little_is_told(config: RunConfig) -> Iterator[None]:
    """Name the fields that a step's memory follows from, where the device or the host lacks it.

    Raises:
      StatedError: in place of the failure for want of memory; others pass.
    """
    try:
        yield
    except (JaxRuntimeError, MemoryError) as error:
        if isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        remat = "" if config.model.remat else " or --model.remat"
        plan = "; mae-jax plan says what a step needs" if isinstance(config, PretrainConfig) else ""
        raise StatedError(
            f"too little memory for batch_size {config.batch_size} with accumulate {config.accumulate} ({error}): "
            f"give a smaller --batch-size, a larger --accumulate{remat}{plan}"
        ) from error


@dataclass(frozen=True)
class Room:
    """Where a run happens."""

    workdir: Path
    length: Length
    engine: Engine
    log: RunLog | SilentLog
    hosts: Hosts


def run(
    config: RunConfig,
    source: Source,
    hosts: Hosts,
    describe_data: str,
    make_watch: Callable[[Room], Watch],
    begin: Callable[[TrainState, Say], TrainState] = lambda state, say: state,
) -> Finished:
    """Train, or go on training, in `config.workdir`; on several hosts, each of them calls this.

    SIGTERM and Ctrl-C end it after the step under way, with a checkpoint. Run again with the same configuration it
    continues from the newest checkpoint, and computes bit for bit what a run never stopped computes.

    begin: completes the state of a run that begins, before it is given weights to start from.

    Raises:
      StatedError: the run cannot start, a loss or gradient norm is not finite, too many files do not decode, or the
        folder cannot be written to.
    """
    length = run_length(config, len(source))
    check_agreement(hosts, config, len(source))
    engine = build_engine(config, length)
    workdir = claim_together(hosts, config, len(source))
    hosts.explain(lambda: how_to_continue(config))
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest(hosts.count))
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, config, len(source), hosts)))
        init = functools.partial(init_state, config)  # one object, which JAX traces once for its shapes and to run it
        shapes = jax.eval_shape(init)
        state = checkpoints.restore_latest(
            shapes, engine.layout(shapes), warn=lambda text: print(f"WARNING: {text}", flush=True)
        )
        if state is None:
            say: Say = print if hosts.first else lambda text: None
            state = begin(engine.begin(init), say)
            if config.init is not None:
                state = start_from(config.init, state, config, say)
        start = int(state.step)
        log: RunLog | SilentLog = RunLog(workdir, start, length.steps) if hosts.first else SilentLog(hosts.index)
        stack.enter_context(log)
        if hosts.first:
            log.say(describe(config, describe_data, engine, state, length))
            if config.optim.warmup_epochs > length.epochs:
                log.say(
                    f"WARNING: optim.warmup_epochs {config.optim.warmup_epochs} is longer than the run's "
                    f"{length.epochs:.4g} epochs: the learning rate never reaches its peak"
                )
        watch = make_watch(Room(workdir, length, engine, log, hosts))
        return Loop(config, source, length, engine, checkpoints, log, stop, hosts, watch).go(state, start)


def how_to_continue(config: RunConfig) -> str:
    """What to do when another host is gone."""
    try:
        start = f"from step {find_checkpoint(config.workdir).name}"
    except StatedError:
        start = "from the beginning, since there is no checkpoint yet"
    return (
        f"Run the same command again: it continues {start} in {config.workdir}, on fewer hosts if need be, as long as "
        f"batch_size {config.batch_size} divides by devices x accumulate {config.accumulate}."
    )


def describe(config: RunConfig, data: str, engine: Engine, state: TrainState, length: Length) -> str:
    """What is about to run."""
    count, trained = (
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (state.params, select(state.params, make_objective(config).trained))
    )
    return (
        f"{'continuing at' if state.step else 'starting'} step {int(state.step)} of {length.steps} "
        f"({length.epochs:.4g} epochs of {data}): {count:,} parameters, "
        f"{'' if trained == count else f'{trained:,} of them trained, '}batch {config.batch_size} "
        f"on {len(engine.devices)} x {engine.devices[0].device_kind}, in {config.workdir}"
    )
