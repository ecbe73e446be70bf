"""A run of a classifier: the loop with evaluations, of which the best is kept."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np

from mae_jax.config import FinetuneConfig
from mae_jax.data.chosen import split_for_training
from mae_jax.data.sources import Source, absolute, open_source
from mae_jax.errors import StatedError
from mae_jax.evaluation.mistakes import write_mistakes
from mae_jax.evaluation.scores import Outcomes, judge
from mae_jax.train.best import save_best
from mae_jax.train.build import build_engine, run_length
from mae_jax.train.hosts import Hosts
from mae_jax.train.initial import Say, start_from
from mae_jax.train.loop import Finished, Room, run
from mae_jax.train.metrics import read_metrics
from mae_jax.train.objective import Params
from mae_jax.train.steps import TrainState, init_state

ALONE = Hosts()


def finetune(config: FinetuneConfig, hosts: Hosts = ALONE) -> Finished:
    """Train a classifier, or go on training it, in `config.workdir`; on several hosts, each of them calls this.

    Evaluates it on the split val every so many epochs and at the end, keeps the best one in WORKDIR/best, and draws
    what the last one takes for what.

    Raises:
      StatedError: as `run`; or the data has no classes, or others than the model.
    """
    config, train, val = open_data(config)
    devices = hosts.count * (config.devices or jax.local_device_count())
    if config.mix.mixes and config.batch_size % (2 * devices):
        raise StatedError(
            f"mixup and cutmix mix neighbours on one device: batch_size {config.batch_size} is not divisible by "
            f"2 x {devices} devices"
        )
    data = f"{len(train):,} images of {len(train.class_names)} classes, {len(val):,} others to evaluate on"

    def begin(state: TrainState, say: Say) -> TrainState:
        if config.init is None:
            say("init is not given: the encoder starts with random weights")
        return state

    return run(config, train, hosts, data, lambda room: Evaluations(config, val, room), begin)


def open_data(config: FinetuneConfig) -> tuple[FinetuneConfig, Source, Source]:
    """The configuration with what the data says, the images to learn from, and those to evaluate on.

    Raises:
      StatedError: the data has no classes, or others than the model.
    """
    config = dataclasses.replace(config, data=absolute(config.data))
    train, val = split_for_training(
        lambda split: open_source(config.data, config.model.in_channels, split), config.data, config.holdout
    )
    classes = len(train.class_names)
    if config.classes not in (None, classes):
        raise StatedError(f"classes {config.classes} asked for, and data {config.data} has {classes}")
    try:
        return dataclasses.replace(config, classes=classes), train, val
    except ValueError as error:
        raise StatedError(str(error)) from error


def evaluate(config: FinetuneConfig, hosts: Hosts = ALONE) -> Outcomes:
    """Evaluate the weights of `config.init` as they are, and draw what they take for what into `config.workdir`.

    Raises:
      StatedError: there are none, they have no head, or the data has other classes.
    """
    if config.init is None:
        raise StatedError("init is not given: which weights are to be evaluated?")
    init = config.init
    config, _, val = open_data(config)
    engine = build_engine(config, run_length(config, len(val)))
    state = start_from(init, engine.begin(lambda: init_state(config)), config, print, whole=True)
    outcomes = judge(state.params, val, config, engine.rows, len(engine.devices), hosts)
    if hosts.first:
        folder = Path(config.workdir)
        folder.mkdir(parents=True, exist_ok=True)
        write_mistakes(folder, outcomes, 0, val, config)
    return outcomes


class Evaluations:
    """Scores on the images that are evaluated on, every so many epochs."""

    def __init__(self, config: FinetuneConfig, val: Source, room: Room) -> None:
        self._config, self._val, self._room = config, val, room
        self._scores: dict[int, float] = {}  # top-1 by step

    def _is_due(self, step: int) -> bool:
        """Whether a whole number of `evaluate_every` has been completed with this step."""
        per_epoch = self._room.length.steps_per_epoch * self._config.evaluate_every
        return step > 0 and math.floor(step / per_epoch) > math.floor((step - 1) / per_epoch)

    def begin(self, step: int, state: TrainState) -> None:
        """What a run that was stopped after this step has left undone."""
        rows = read_metrics(self._room.workdir)
        self._scores = {int(row["step"]): row["top1"] for row in rows if "top1" in row and row["step"] <= step}
        if step not in self._scores:
            self.after(step, state, step == self._room.length.steps)

    def after(self, step: int, state: TrainState, last: bool) -> None:
        """An evaluation, if it is time for one; after the last step, pictures too."""
        if not last and not self._is_due(step):
            return
        outcomes, head = self._evaluate(step, state)
        if last and self._room.hosts.first:
            write_mistakes(self._room.workdir, outcomes, head, self._val, self._config)

    def _evaluate(self, step: int, state: TrainState) -> tuple[Outcomes, int]:
        config, room = self._config, self._room
        params = state.params if state.average is None else state.average
        outcomes = judge(params, self._val, config, room.engine.rows, len(room.engine.devices), room.hosts)
        top1, top5, loss = outcomes.top(1), outcomes.top(5), outcomes.loss.mean(axis=1)
        head = int(np.argmax(top1))
        row = {"top1": float(top1[head]), "top5": float(top5[head]), "evaluation_loss": float(loss[head])}
        if config.sweep:
            row |= {"best_base_lr": config.sweep[head]}
            row |= {f"top1_at_{rate:g}": float(score) for rate, score in zip(config.sweep, top1, strict=True)}
        if outcomes.left_out:
            row["left_out"] = outcomes.left_out
        better = all(row["top1"] > score for at, score in self._scores.items() if at < step)
        self._scores[step] = row["top1"]
        if better:
            save_best(room.workdir, step, *single(config, params, head), room.hosts)
        room.log.row(step, row)
        return outcomes, head


def single(config: FinetuneConfig, params: Params, head: int) -> tuple[FinetuneConfig, Params]:
    """A classifier by itself: one of a sweep as a run with its rate alone would have it, a running average as it is."""
    optim = dataclasses.replace(config.optim, ema_decay=None)
    if not config.sweep:
        return dataclasses.replace(config, optim=optim), params
    optim = dataclasses.replace(optim, base_lr=config.sweep[head])
    chosen = jax.tree.map(lambda values: values[head], params["head"])
    return dataclasses.replace(config, sweep=(), optim=optim), params | {"head": chosen}
