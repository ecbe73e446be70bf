"""One run, from its configuration to its last checkpoint."""

import contextlib
import functools
from collections.abc import Iterator

import jax
from jax.errors import JaxRuntimeError

from mae_jax.config import Run
from mae_jax.data.sources.source import Source
from mae_jax.errors import StatedError
from mae_jax.hosts import Hosts
from mae_jax.runs.log import Log, RunLog, SilentLog, print_line
from mae_jax.runs.loop import Callback, Finished, Loop, TrainingRun
from mae_jax.runs.stop import StopRequest
from mae_jax.storage.checkpoints import Checkpoints
from mae_jax.storage.workdir import claimed
from mae_jax.train.build import Length, build_engine, run_length
from mae_jax.train.engines import Engine
from mae_jax.train.step import TrainState, init_state, make_objective, select


def run(config: Run, source: Source, hosts: Hosts, callback: Callback, stop: StopRequest | None = None) -> Finished:
    """Train, or go on training, in `config.workdir`; on several hosts, each of them calls this.

    A request to stop ends it after the step under way, with a checkpoint. Run again with the same configuration it
    continues from the newest checkpoint, and computes bit for bit what a run never stopped computes.

    Raises:
      StatedError: the run cannot start, a loss or gradient norm is not finite, too many files do not decode, memory is
        too little, or the folder cannot be written to.
    """
    with memory_errors(config), contextlib.ExitStack() as stack:
        # What is to be done, by whom, and with what: refused before anything is written.
        length = run_length(config, len(source))
        if hosts.count > 1:
            from mae_jax.storage.agreement import check_agreement  # noqa: PLC0415

            check_agreement(hosts, config, len(source))
        engine = build_engine(config, length)

        # The folder, and the state to begin or to go on with.
        workdir, held = stack.enter_context(claimed(hosts, config, len(source), print_line))
        checkpoints = stack.enter_context(Checkpoints(workdir, config, len(source), hosts, held))
        init = functools.partial(init_state, config)  # one object, which JAX traces once for its shapes and to run it
        shapes = jax.eval_shape(init)
        state = checkpoints.restore_latest(
            shapes, engine.shardings(shapes), warn=lambda text: print_line(f"WARNING: {text}")
        )
        if state is None:
            state = first_state(config, source, engine, hosts, init)

        # From here on everything goes into the log.
        start = int(state.step)
        log: Log = RunLog(workdir, start, length.steps, config.log_every) if hosts.first else SilentLog(hosts.index)
        stack.enter_context(log)
        if hosts.first:
            log.message(describe(config, source, engine, state, length))
            if config.optim.warmup_epochs > length.epochs:
                log.message(
                    f"WARNING: optim.warmup_epochs {config.optim.warmup_epochs} is longer than the run's "
                    f"{length.epochs:.4g} epochs: the learning rate never reaches its peak"
                )
        training = TrainingRun(config, source, hosts, length, engine, workdir, held, checkpoints, log)
        return Loop(training, callback, stop or StopRequest()).go(state, start)


def first_state(config: Run, source: Source, engine: Engine, hosts: Hosts, init: functools.partial) -> TrainState:
    """Make the state before the first step: random, its PCA target fitted to the data, with the weights of `init`."""

    def message(text: str) -> None:
        if hosts.first:
            print_line(text)

    # What few runs need is imported by those that do.
    state: TrainState = engine.init_state(init)
    if config.kind == "pretraining" and config.model.pca_components is not None:
        from mae_jax.runs.target import with_fitted_target  # noqa: PLC0415

        state = with_fitted_target(state, config, source, hosts, message)
    if config.init is not None:
        from mae_jax.runs.initial import start_from  # noqa: PLC0415

        return start_from(config.init, state, config, message)
    if config.kind == "classification":
        message("init is not given: the encoder starts with random weights")
    return state


@contextlib.contextmanager
def memory_errors(config: Run) -> Iterator[None]:
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
        plan = "; mae-jax plan shows what a step needs" if config.kind == "pretraining" else ""
        raise StatedError(
            f"too little memory for batch_size {config.batch_size} with accumulate {config.accumulate} ({error}): "
            f"give a smaller --batch-size, a larger --accumulate{remat}{plan}",
            field="batch_size",
        ) from error


def describe(config: Run, source: Source, engine: Engine, state: TrainState, length: Length) -> str:
    """Word what is about to run."""
    count, trained = (
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (state.params, select(state.params, make_objective(config).trained))
    )
    classes = f" of {len(source.class_names)} classes" if config.kind == "classification" else ""
    hosts, devices = jax.process_count(), len(engine.devices)
    each = f"{hosts} hosts x {devices // hosts}" if hosts > 1 else f"{devices}"
    return (
        f"{'continuing at' if state.step else 'starting'} step {int(state.step)} of {length.steps} "
        f"({length.epochs:.4g} epochs of {len(source):,} images{classes}): {count:,} parameters, "
        f"{'' if trained == count else f'{trained:,} of them trained, '}batch {config.batch_size} "
        f"on {each} x {engine.devices[0].device_kind}, in {config.workdir}"
    )
