"""One run, from its configuration to its last checkpoint: the room where everything meets."""

import contextlib
import dataclasses
import functools
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from mae_jax.config import FinetuneConfig, RunConfig
from mae_jax.data.broken import BrokenFiles
from mae_jax.data.pipeline import TrainingBatch, training_batches
from mae_jax.data.sources import Source
from mae_jax.errors import StatedError
from mae_jax.train.agreement import check_agreement, claim_together
from mae_jax.train.build import Length, build_engine, run_length
from mae_jax.train.checkpoint import Checkpoints
from mae_jax.train.engines import Engine
from mae_jax.train.hosts import Hosts
from mae_jax.train.initial import Say, start_from
from mae_jax.train.metrics import RunLog, SilentLog
from mae_jax.train.objective import Batch, Params
from mae_jax.train.selection import select
from mae_jax.train.signals import StopRequest
from mae_jax.train.steps import Metrics, TrainState, init_state, make_objective
from mae_jax.train.workdir import find_checkpoint


class Finished(NamedTuple):
    """How a run ended: at which step, and the signal that ended it early, if one did."""

    workdir: Path
    step: int
    signal: signal.Signals | None


@runtime_checkable
class Watch(Protocol):
    """What looks at a run between its steps."""

    def begin(self, step: int, state: TrainState) -> None:
        """Before the first step, or where a stopped run goes on."""

    def after(self, step: int, state: TrainState, last: bool) -> None:
        """After a step and its checkpoint, but not where the run is told to stop: whoever stops it may not wait."""


@dataclasses.dataclass(frozen=True)
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
        return Run(config, source, length, engine, checkpoints, log, stop, hosts, watch).go(state, start)


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


@dataclasses.dataclass
class Window:
    """The steps since the last row of the log: how many, since when, and how long they waited for data."""

    began: float = dataclasses.field(default_factory=time.perf_counter)
    steps: int = 0
    waited: float = 0.0  # seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training's."""
        since = time.perf_counter()
        yield
        self.began += time.perf_counter() - since

    def rates(self, batch_size: int) -> dict[str, float]:
        """Images a second, and the share of the time that went by waiting for data."""
        seconds = time.perf_counter() - self.began
        return {"images_per_second": self.steps * batch_size / seconds, "data_wait": self.waited / seconds}


@jax.jit
def all_finite(tree: Params) -> Bool[Array, ""]:
    """Whether every number of every array is finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


@dataclasses.dataclass
class Run:
    """The loop over steps, and what happens between them."""

    config: RunConfig
    source: Source
    length: Length
    engine: Engine
    checkpoints: Checkpoints
    log: RunLog | SilentLog
    stop: StopRequest
    hosts: Hosts
    watch: Watch

    def __post_init__(self) -> None:
        self.broken = BrokenFiles(self.source, self.log.say)
        self.unread: list[Metrics] = []  # of steps whose numbers were not looked at yet, on the device
        self.latest: Metrics | None = None  # of the last step looked at
        self.window = Window()

    def go(self, state: TrainState, start: int) -> Finished:
        """Run the steps from `start` to the end, or to a stop."""
        config, step = self.config, start
        in_flight: deque[Metrics] = deque()
        with contextlib.closing(
            training_batches(
                self.source,
                config,
                start_step=start,
                stop_step=self.length.steps,
                process_index=self.hosts.index,
                process_count=self.hosts.count,
            )
        ) as batches:
            self.watch.begin(start, state)
            self.window = Window()
            for batch in self._timed(iter(batches)):
                self.broken.update(batch["broken"])
                state, metrics = self.engine.step(state, self.engine.put(self._rows(batch)))
                step += 1
                self.unread.append(metrics)
                self.window.steps += 1
                in_flight.append(metrics)
                if len(in_flight) > self.engine.in_flight:
                    jax.block_until_ready(in_flight.popleft())
                self.log.step_done()
                stopped = self.stop.after(step)
                last = stopped or step == self.length.steps
                if step % config.log_every == 0 or last:
                    self._log(step)
                if step % config.save_every == 0 or last:
                    self._save(step, state)
                if not stopped:
                    with self.window.paused():
                        self.watch.after(step, state, last)
                if last:
                    break
        return Finished(self.checkpoints.folder.parent, step, self.stop.signal if step < self.length.steps else None)

    def _rows(self, batch: TrainingBatch) -> Batch:
        """What the step is given of a batch.

        Raises:
          StatedError: classes are learnt, and an image has none.
        """
        labels = None
        if isinstance(self.config, FinetuneConfig):
            labels = batch["label"]
            if labels.min() < 0:
                raise StatedError(f"data {self.config.data} has images without a class; leave them out")
        return Batch(batch["image"], batch["position"], batch.get("crop"), labels)

    def _timed(self, batches: Iterator[TrainingBatch]) -> Iterator[TrainingBatch]:
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.window.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def _check_finite(self, step: int) -> Metrics:
        """Wait for the steps up to this one, look at their numbers, and give back the last."""
        seen = jax.device_get(self.unread)
        self.unread = []
        for number, metrics in enumerate(seen, step - len(seen) + 1):
            for name, value in metrics._asdict().items():
                if not np.isfinite(value):
                    self._fail(number, f"{name} is {value} at step {number}")
            self.latest = metrics
        assert self.latest is not None
        return self.latest

    def _save(self, step: int, state: TrainState) -> None:
        """Save what can be gone on from."""
        self._check_finite(step)
        if not all_finite(state.params):
            self._fail(step + 1, f"parameters are not finite after step {step}")
        self.checkpoints.save(step, state)

    def _fail(self, step: int, reason: str) -> NoReturn:
        """End the run, which the parameters that went into `step` have ruined: their checkpoint is no good."""
        self.checkpoints.move_aside([saved for saved in self.checkpoints.steps() if saved >= step - 1])
        steps = self.checkpoints.steps()
        good = f"The last good checkpoint is {self.checkpoints.path(steps[-1])}" if steps else "No checkpoint is good"
        raise StatedError(
            f"{reason}. {good}. Lower optim.base_lr {self.config.optim.base_lr}, or set optim.clip_norm, "
            "in another --workdir."
        )

    def _log(self, step: int) -> None:
        metrics = self._check_finite(step)
        values = {name: float(value) for name, value in metrics._asdict().items()}
        self.log.row(step, values | self.window.rates(self.config.batch_size) | {"broken_files": self.broken.count})
        self.window = Window()
