"""The loop over steps, and what happens between them: the log, checkpoints, the end."""

import contextlib
import dataclasses
import math
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

from mae_jax.config import Run
from mae_jax.data.images.decode import BrokenImage
from mae_jax.data.sources.source import Source
from mae_jax.data.stream import TrainingBatch, training_batches
from mae_jax.errors import StatedError
from mae_jax.files import Hold
from mae_jax.hosts import Hosts
from mae_jax.models import Params
from mae_jax.runs.log import Log
from mae_jax.runs.stop import StopRequest
from mae_jax.storage.checkpoints import Checkpoints
from mae_jax.train.build import Length
from mae_jax.train.engines import Engine
from mae_jax.train.objective import Batch
from mae_jax.train.step import Metrics, TrainState


class Finished(NamedTuple):
    """How a run ended: at which step, and the signal that ended it early, if one did."""

    workdir: Path
    step: int
    signal: signal.Signals | None


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """A run that has been started: what it was given, and what it works with."""

    config: Run
    source: Source
    hosts: Hosts
    length: Length
    engine: Engine
    workdir: Path
    held: Hold | None  # the first host's, which holds the folder for this run
    checkpoints: Checkpoints
    log: Log


@runtime_checkable
class Callback(Protocol):
    """What looks at a run between its steps."""

    def start(self, run: TrainingRun, step: int, state: TrainState) -> None:
        """Look at the state before the first step, or where a stopped run goes on."""

    def after(self, run: TrainingRun, step: int, state: TrainState, last: bool) -> None:
        """Look at the state after a step and its checkpoint; not where the run is asked to stop: that may not wait."""


@dataclasses.dataclass
class Window:
    """The steps since the last row of the log: how many, since when, and how long they waited for data."""

    began: float = dataclasses.field(default_factory=time.perf_counter)
    steps: int = 0
    waited: float = 0.0  # seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out time that is not training's."""
        since = time.perf_counter()
        yield
        self.began += time.perf_counter() - since

    def rates(self, batch_size: int) -> dict[str, float]:
        """Return images a second, and the share of the time that went by waiting for data."""
        seconds = time.perf_counter() - self.began
        return {"images_per_second": self.steps * batch_size / seconds, "data_wait": self.waited / seconds}


@jax.jit
def all_finite(tree: Params) -> Bool[Array, ""]:
    """Return whether every number of every array is finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


class StepsInFlight:
    """The steps that were given out to the device and are not known to be done: so many, and about AHEAD seconds.

    The host runs ahead of the device, so that the next step is there when one is done. A run that is to stop waits for
    all of them; so there are fewer where steps take long, down to one.
    """

    AHEAD = 2.0

    def __init__(self, most: int) -> None:
        self._most = most
        self._steps: deque[Metrics] = deque()
        self._seconds = math.inf  # of a step; not known before the first is done
        self._done = time.perf_counter()  # when the last was seen done

    def add(self, metrics: Metrics) -> None:
        """Take in a step that was given out."""
        self._steps.append(metrics)

    def wait(self) -> None:
        """Wait for the oldest until another step may be given out."""
        while len(self._steps) >= max(1, min(self._most, self.AHEAD // max(self._seconds, 1e-6))):
            began = time.perf_counter()
            jax.block_until_ready(self._steps.popleft())
            now = time.perf_counter()
            if now - began > 1e-3:  # else it was done some time ago
                self._seconds = now - self._done
            self._done = now


class Loop:
    """The loop over the steps of a run."""

    def __init__(self, run: TrainingRun, callback: Callback, stop: StopRequest) -> None:
        self.run, self.callback, self.stop = run, callback, stop
        self.broken = BrokenFiles(run.source, run.log.message)
        self.unread: list[Metrics] = []  # of steps whose numbers were not looked at yet, on the device
        self.latest: Metrics | None = None  # of the last step looked at
        self.window = Window()

    def go(self, state: TrainState, start: int) -> Finished:
        """Run the steps from `start` to the end, or to a stop."""
        run, config, step, stopped = self.run, self.run.config, start, False
        in_flight = StepsInFlight(run.engine.in_flight)
        with training_batches(
            run.source,
            config,
            start_step=start,
            stop_step=run.length.steps,
            process_index=run.hosts.index,
            process_count=run.hosts.count,
        ) as batches:
            self.stop.start(run.workdir, start + 1, run.hosts.count > 1)
            self.callback.start(run, start, state)
            self.window = Window()
            for batch in self._timed(iter(batches)):
                self.broken.update(batch["broken"])
                rows = run.engine.put_batch(self._rows(batch))  # on its way while earlier steps are computed
                in_flight.wait()

                # A stop comes before the next step is given out, and not before there is one to save.
                if step > start and self.stop.after(step):
                    stopped = True
                    break
                state, metrics = run.engine.step(state, rows)
                step += 1
                self.unread.append(metrics)
                self.window.steps += 1
                in_flight.add(metrics)
                run.log.step_done()

                # Between two steps: look, and save, where it is time to.
                last = step == run.length.steps
                if step % config.log_every == 0 or last:
                    self._log(step)
                if step % config.save_every == 0 or last:
                    self._save(step, state)
                if self.stop.imminent:
                    stopped = True
                    break
                with self.window.paused():
                    self.callback.after(run, step, state, last)
            if stopped:  # after a step that was saved just now this saves nothing more
                if self.window.steps:
                    self._log(step)
                self._save(step, state)
        return Finished(run.workdir, step, self.stop.signal if stopped else None)

    def _rows(self, batch: TrainingBatch) -> Batch:
        """Take what the step needs of a batch.

        Raises:
          StatedError: classes are learnt, and an image has none.
        """
        labels, config = None, self.run.config
        if config.kind == "classification":
            labels = batch["label"]
            if labels.min() < 0:
                raise StatedError(f"data {config.data} has images without a class; leave them out", field="data")
        return Batch(batch["image"], batch["position"], batch.get("crop"), labels)

    def _timed(self, batches: Iterator[TrainingBatch]) -> Iterator[TrainingBatch]:
        """Measure how long each batch is waited for."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.window.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def _check_finite(self, step: int) -> Metrics:
        """Wait for the steps up to this one, look at their numbers, and return the last."""
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
        """Save a state that can be continued from."""
        self._check_finite(step)
        if not all_finite(state.params):
            self._fail(step + 1, f"parameters are not finite after step {step}")
        self.run.log.sync()
        self.run.checkpoints.save(step, state)

    def _fail(self, step: int, reason: str) -> NoReturn:
        """End the run, which the parameters that went into `step` have ruined: their checkpoint is no good."""
        # Checkpoint step - 1 holds the parameters that went into this step.
        checkpoints = self.run.checkpoints
        checkpoints.move_aside([saved for saved in checkpoints.steps() if saved >= step - 1])
        steps = checkpoints.steps()
        good = f"The last good checkpoint is {checkpoints.path(steps[-1])}" if steps else "No checkpoint is good"
        raise StatedError(
            f"{reason}. {good}. Lower optim.base_lr {self.run.config.optim.base_lr}, or set optim.clip_norm, "
            "in another --workdir.",
            field="optim.base_lr",
        )

    def _log(self, step: int) -> None:
        """Write a row of the last step's numbers and of the window's rates."""
        metrics = self._check_finite(step)
        values = {name: float(value) for name, value in metrics._asdict().items()}
        rates = self.window.rates(self.run.config.batch_size)
        self.run.log.row(step, values | rates | {"broken_files": self.broken.count})
        self.window = Window()


class BrokenFiles:
    """The files of a run that do not decode: each is logged once, and too many of them end the run.

    They are taken from the batches' `broken` arrays, in the main process; the account starts anew when a run continues.
    """

    def __init__(self, source: Source, log: Callable[[str], None]) -> None:
        self._source = source
        self._log = log
        self._reasons: dict[int, str] = {}
        self.limit = max(10, len(source) // 1000)  # 0.1 % of an epoch

    @property
    def count(self) -> int:
        """Count the distinct files so far."""
        return len(self._reasons)

    def update(self, broken: np.ndarray) -> None:
        """Take in a batch's `broken`: int64 (batch,), the source's index of each file that was replaced, else -1.

        Raises:
          StatedError: more files are broken than `limit`.
        """
        for index in broken[broken >= 0].tolist():
            if index not in self._reasons:
                self._reasons[index] = reason = self._describe(index)
                self._log(f"{reason}; the next image in the stream takes its place")
        if self.count > self.limit:
            first = "; ".join(list(self._reasons.values())[:3])
            raise StatedError(
                f"{self.count} of {len(self._source):,} images are broken, more than the {self.limit} that are "
                f"passed over: {first}. Remove or repair them, or check that the disk can be read.",
                field="data",
            )

    def _describe(self, index: int) -> str:
        """Decode a file once more for the reason: the worker that met it has only its index to send."""
        try:
            self._source.load(index)
        except BrokenImage as error:
            return str(error)
        return f"{self._source.name(index)} did not decode, though it does now"
