"""A run of a classifier: the loop with evaluations, of which the best is kept."""

import dataclasses
import json
import math

import jax
import numpy as np

from mae_jax.config import FinetuneConfig
from mae_jax.data.sources.source import Source, absolute, open_source
from mae_jax.data.sources.split import split_for_training
from mae_jax.errors import StatedError
from mae_jax.evaluation.classify import CONFUSION, WORST, Outcomes, evaluate_classifier, write_mistakes
from mae_jax.files import local_path
from mae_jax.hosts import ALONE, Hosts
from mae_jax.models import Params
from mae_jax.runs.initial import start_from
from mae_jax.runs.loop import Finished, TrainingRun
from mae_jax.runs.metrics import read_metrics
from mae_jax.runs.run import memory_errors, run
from mae_jax.runs.stop import StopRequest
from mae_jax.storage.checkpoints import BEST, drop_later, save_best
from mae_jax.storage.workdir import checkpoint_folders, make_writable, unwritable
from mae_jax.train.build import build_engine, run_length
from mae_jax.train.step import TrainState, init_state

EVALUATED = "evaluated"  # beside what a run in the same folder has drawn


def finetune(config: FinetuneConfig, hosts: Hosts = ALONE, stop: StopRequest | None = None) -> Finished:
    """Train a classifier, or go on training it, in `config.workdir`; on several hosts, each of them calls this.

    Evaluates it on the split val every so many epochs and at the end, keeps the best one in WORKDIR/best, and draws
    the confusion matrix of the last one.

    stop: ends it early, with a checkpoint; from a handler of signals or another thread.

    Raises:
      StatedError: as `run`; or the data has no classes, or others than the model.
    """
    config, train, val = open_data(config)
    devices = hosts.count * (config.devices or jax.local_device_count())
    if config.mix.mixes and config.batch_size % (2 * devices * config.accumulate):
        raise StatedError(
            f"mixup and cutmix mix neighbours in one part of a device's batch: batch_size {config.batch_size} is not "
            f"divisible by 2 x {devices} devices x accumulate {config.accumulate}",
            field="batch_size",
        )
    return run(config, train, hosts, Evaluations(config, val), stop)


def open_data(config: FinetuneConfig) -> tuple[FinetuneConfig, Source, Source]:
    """Open the data: the configuration with its classes, the images to learn from, and those to evaluate on.

    Raises:
      StatedError: the data has no classes, or others than the model.
    """
    config = dataclasses.replace(config, data=absolute(config.data))
    train, val = split_for_training(
        lambda split: open_source(config.data, config.model.in_channels, split), config.data, config.holdout
    )
    classes = len(train.class_names)
    if config.classes not in (None, classes):
        raise StatedError(f"classes {config.classes} asked for, and data {config.data} has {classes}", field="classes")
    try:
        return dataclasses.replace(config, classes=classes), train, val
    except ValueError as error:
        raise StatedError(str(error), field="classes") from error


def evaluate(config: FinetuneConfig, hosts: Hosts = ALONE) -> Outcomes:
    """Evaluate the weights of `config.init` as they are, and draw the confusion matrix into WORKDIR/evaluated.

    Raises:
      StatedError: there are none, they have no head, the data has other classes, or the folder cannot be written to.
    """
    if config.init is None:
        raise StatedError("init is not given: which weights are to be evaluated?", field="init")
    init = config.init
    config, _, val = open_data(config)
    folder = local_path(config.workdir, "workdir") / EVALUATED
    if hosts.first:
        try:
            make_writable(folder)
        except OSError as error:
            raise unwritable(config.workdir, error) from error
    message = print if hosts.first else lambda text: None
    with memory_errors(config):
        engine = build_engine(config, run_length(config, len(val)))
        state = start_from(init, engine.init_state(lambda: init_state(config)), config, message, whole=True)
        outcomes = evaluate_classifier(state.params, val, config, engine.put_rows, len(engine.devices), hosts)
    if hosts.first:
        write_mistakes(folder, outcomes, 0, val, config)
    return outcomes


class Evaluations:
    """Scores on the images that are evaluated on, every so many epochs."""

    def __init__(self, config: FinetuneConfig, val: Source) -> None:
        self._config, self._val = config, val
        self._scores: dict[int, float] = {}  # top-1 by step
        self._best = -1.0  # of those, the one that is kept

    def _is_due(self, run: TrainingRun, step: int) -> bool:
        """Return whether a whole number of `evaluate_every` has been completed with this step."""
        per_epoch = run.length.steps_per_epoch * self._config.evaluate_every
        return step > 0 and math.floor(step / per_epoch) > math.floor((step - 1) / per_epoch)

    def start(self, run: TrainingRun, step: int, state: TrainState) -> None:
        """Do what a run that was stopped after this step has left undone."""
        if run.hosts.first:
            run.log.message(f"evaluating on {len(self._val):,} other images")
        rows = read_metrics(run.workdir)
        scores = [(int(row["step"]), row["top1"]) for row in rows if "top1" in row and row["step"] <= step]
        ended = step == run.length.steps
        drawn = all((run.workdir / name).exists() for name in (CONFUSION, WORST))
        drop_later(run.workdir, step, run.hosts, run.held)
        kept = bool(checkpoint_folders(run.workdir / BEST))
        # As the first host sees the folder: all of them evaluate, or none.
        seen = run.hosts.gather(f"scores {step}", json.dumps([scores, ended and not drawn, kept]))[0]
        scores, undrawn, kept = json.loads(seen)
        self._scores = dict(map(tuple, scores))
        self._best = max(self._scores.values(), default=-1.0) if kept else -1.0
        if step not in self._scores or undrawn:
            self.after(run, step, state, ended)

    def after(self, run: TrainingRun, step: int, state: TrainState, last: bool) -> None:
        """Evaluate, if it is time for it; after the last step, draw pictures too."""
        if not last and not self._is_due(run, step):
            return
        outcomes, head = self._evaluate(run, step, state)
        if last and run.hosts.first:
            write_mistakes(run.workdir, outcomes, head, self._val, self._config)

    def _evaluate(self, run: TrainingRun, step: int, state: TrainState) -> tuple[Outcomes, int]:
        """Score every head; write a row, and keep the best head where it is the best so far."""
        config = self._config
        params = state.params if state.average is None else state.average
        outcomes = evaluate_classifier(
            params, self._val, config, run.engine.put_rows, len(run.engine.devices), run.hosts
        )
        top1, top5, loss = outcomes.top(1), outcomes.top(5), outcomes.loss.mean(axis=1)
        head = int(np.argmax(top1))
        row = {"top1": float(top1[head]), "top5": float(top5[head]), "evaluation_loss": float(loss[head])}
        if config.sweep:
            row |= {"best_base_lr": config.sweep[head]}
            row |= {f"top1_at_{rate:g}": float(score) for rate, score in zip(config.sweep, top1, strict=True)}
        if outcomes.left_out:
            row["left_out"] = outcomes.left_out
        if not np.isfinite(loss[head]):
            raise StatedError(
                f"the loss of the evaluation is {loss[head]} after step {step}: lower optim.base_lr "
                f"{config.optim.base_lr}, or set optim.clip_norm, in another --workdir.",
                field="optim.base_lr",
            )
        if step in self._scores:
            return outcomes, head
        self._scores[step] = row["top1"]
        if row["top1"] > self._best:
            self._best = row["top1"]
            save_best(run.workdir, step, *single(config, params, head), run.hosts, run.held)
        run.log.row(step, row)
        return outcomes, head


def single(config: FinetuneConfig, params: Params, head: int) -> tuple[FinetuneConfig, Params]:
    """Take one classifier out of a run: a head of a sweep as a run at its rate alone would have it, or the average."""
    optim = dataclasses.replace(config.optim, ema_decay=None)
    if not config.sweep:
        return dataclasses.replace(config, optim=optim), params
    optim = dataclasses.replace(optim, base_lr=config.sweep[head])
    own = jax.tree.map(lambda values: values[head], params["head"])
    return dataclasses.replace(config, sweep=(), optim=optim), params | {"head": own}
