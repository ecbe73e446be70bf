"""One pretraining run, from its configuration to its last checkpoint: the room where everything meets."""

import contextlib
import dataclasses
import math
import signal
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from mae_jax import rng
from mae_jax.config import PretrainConfig
from mae_jax.data.broken import BrokenFiles
from mae_jax.data.evaluation import load_samples
from mae_jax.data.pipeline import TrainingBatch, training_batches
from mae_jax.data.sources import Source, open_source
from mae_jax.errors import StatedError
from mae_jax.evaluation.reconstruction import draw, reconstruct, sample_noise
from mae_jax.train.checkpoint import Checkpoints
from mae_jax.train.engines import PmapEngine, choose_devices, pmap_engine
from mae_jax.train.metrics import RunLog
from mae_jax.train.signals import StopRequest
from mae_jax.train.steps import Batch, Metrics, TrainState, init_state, make_step
from mae_jax.train.workdir import claim

PICTURED = 8  # images in the pictures of reconstructions


class Length(NamedTuple):
    """How long a run is: `steps` updates, which are `epochs` epochs of `steps_per_epoch` (all but the first may be
    fractional: the stream of examples runs on over the end of an epoch)."""

    steps: int
    steps_per_epoch: float
    epochs: float


def run_length(config: PretrainConfig, examples: int) -> Length:
    """The length of a run on so many examples.

    Raises:
      StatedError: it would number more examples than a position can.
    """
    steps_per_epoch = examples / config.batch_size
    steps = config.steps if config.steps is not None else max(1, math.ceil(config.epochs * steps_per_epoch))
    if steps * config.batch_size > rng.MAX_POSITION:
        raise StatedError(
            f"steps {steps} x batch_size {config.batch_size} is more than the {rng.MAX_POSITION} examples of one run"
        )
    return Length(steps, steps_per_epoch, steps / steps_per_epoch)


class Finished(NamedTuple):
    """How a run ended: at which step, and the signal that ended it early, if one did."""

    workdir: Path
    step: int
    signal: signal.Signals | None


def build_engine(config: PretrainConfig, length: Length) -> PmapEngine:
    """The compiled step of a run on the devices that it asks for.

    Raises:
      StatedError: there are not so many devices, the batch does not divide, or float64 is not switched on.
    """
    if config.model.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise StatedError('precision float64 needs jax.config.update("jax_enable_x64", True) before the run')
    return pmap_engine(
        lambda axis: make_step(config, steps_per_epoch=length.steps_per_epoch, epochs=length.epochs, axis_name=axis),
        choose_devices(config.devices),
        config.batch_size,
        config.accumulate,
    )


def pretrain(config: PretrainConfig) -> Finished:
    """Pretrain, or go on pretraining, in `config.workdir`.

    SIGTERM and Ctrl-C end it after the step under way, with a checkpoint. Run again with the same configuration it
    continues from the newest checkpoint, and computes bit for bit what a run never stopped computes.

    Raises:
      StatedError: the run cannot start, a loss or gradient norm is not finite, or too many files do not decode.
    """
    source = open_source(config.data, config.model.in_channels)
    length = run_length(config, len(source))
    engine = build_engine(config, length)
    workdir = claim(config)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, config)))
        initial = engine.place(init_state(config))
        state = checkpoints.restore_latest(initial, engine.replicated, warn=lambda text: print(f"WARNING: {text}"))
        state = initial if state is None else state
        del initial
        start = int(state.step)
        log = stack.enter_context(RunLog(workdir, start, length.steps))
        log.say(describe(config, source, engine, state, length))
        return Run(config, source, length, engine, checkpoints, log, stop).go(state, start)


def describe(config: PretrainConfig, source: Source, engine: PmapEngine, state: TrainState, length: Length) -> str:
    """What is about to run."""
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return (
        f"{'continuing at' if state.step else 'starting'} step {int(state.step)} of {length.steps} "
        f"({length.epochs:.4g} epochs of {len(source):,} images): {count:,} parameters, batch {config.batch_size} "
        f"on {len(engine.devices)} x {engine.devices[0].device_kind}, in {config.workdir}"
    )


@dataclasses.dataclass
class Run:
    """The loop over steps, and what happens between them."""

    config: PretrainConfig
    source: Source
    length: Length
    engine: PmapEngine
    checkpoints: Checkpoints
    log: RunLog
    stop: StopRequest

    def __post_init__(self) -> None:
        self.broken = BrokenFiles(self.source, self.log.say)
        self.unread: list[Metrics] = []  # of the steps since the last look, still on the device
        self.looked = time.perf_counter()
        self.waited = 0.0  # seconds since the last look that went by waiting for data
        image_hw = self.config.model.image_hw
        self.samples = load_samples(self.source, range(len(self.source)), PICTURED, image_hw)

    def go(self, state: TrainState, start: int) -> Finished:
        """Run the steps from `start` to the end, or to a stop."""
        config, step = self.config, start
        in_flight: deque[Metrics] = deque()
        with contextlib.closing(
            training_batches(self.source, config, start_step=start, stop_step=self.length.steps)
        ) as batches:
            for batch in self._timed(iter(batches)):
                self.broken.update(batch["broken"])
                state, metrics = self.engine.step(
                    state, self.engine.put(Batch(batch["image"], batch["position"], batch.get("crop")))
                )
                step += 1
                self.unread.append(metrics)
                in_flight.append(metrics)
                if len(in_flight) > self.engine.in_flight:
                    jax.block_until_ready(in_flight.popleft())
                self.log.step_done()
                last = step == self.length.steps or self.stop.signal is not None
                if step % config.log_every == 0 or last:
                    self._log(step)
                if config.reconstruct_every is not None and (step % config.reconstruct_every == 0 or last):
                    self._picture(step, state)
                if step % config.save_every == 0 or last:
                    self._check_finite(step)
                    self.checkpoints.save(step, state)
                if last:
                    break
        return Finished(self.checkpoints.folder.parent, step, self.stop.signal if step < self.length.steps else None)

    def _timed(self, batches: Iterator[TrainingBatch]) -> Iterator[TrainingBatch]:
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def _check_finite(self, step: int) -> list[Metrics]:
        """Wait for the steps since the last look, and look at their numbers."""
        seen = jax.device_get(self.unread)
        self.unread = []
        for number, metrics in enumerate(seen, step - len(seen) + 1):
            for name in ("loss", "grad_norm"):
                value = getattr(metrics, name)
                if not np.isfinite(value):
                    raise StatedError(f"{name} is {value} at step {number}. {self._last_good()}")
        return seen

    def _last_good(self) -> str:
        steps = self.checkpoints.steps()
        where = (
            f"The last good checkpoint is {self.checkpoints.path(steps[-1])}" if steps else "No checkpoint was written"
        )
        return (
            f"{where}. Lower optim.base_lr {self.config.optim.base_lr}, or set optim.clip_norm, in another --workdir."
        )

    def _log(self, step: int) -> None:
        seen = self._check_finite(step)
        now = time.perf_counter()
        seconds = now - self.looked
        self.log.row(
            step,
            {name: float(value) for name, value in seen[-1]._asdict().items()}
            | {
                "images_per_second": len(seen) * self.config.batch_size / seconds,
                "data_wait": self.waited / seconds,
                "broken_files": self.broken.count,
            },
        )
        self.looked, self.waited = now, 0.0

    def _picture(self, step: int, state: TrainState) -> None:
        model = self.config.model
        noise = sample_noise(self.config.seed, len(self.samples), model)
        params = state.params if state.average is None else state.average
        views = reconstruct(
            jax.device_put(params, self.engine.devices[0]), self.samples, noise, model, self.config.augment
        )
        self.log.picture("reconstruction", step, np.asarray(draw(views, f"step {step}")))
