"""A run so small that its step compiles in a second."""

import contextlib
import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.config import AugmentConfig, ModelConfig, OptimConfig, PretrainConfig, TransformerConfig
from mae_jax.storage.checkpoints import Checkpoints
from mae_jax.train.objective import Batch
from mae_jax.train.step import init_state
from tests.storage.saved_runs import STEPS, state_at

TINY = PretrainConfig(
    model=ModelConfig(
        image_size=8,
        patch_size=2,
        in_channels=1,
        encoder=TransformerConfig(width=16, depth=1, heads=2, mlp_ratio=2.0),
        decoder=TransformerConfig(width=8, depth=1, heads=2, mlp_ratio=2.0),
        norm_pix_loss=True,
    ),
    augment=AugmentConfig(mean=(0.3,), std=(0.4,)),
    optim=OptimConfig(base_lr=0.16, warmup_epochs=1),
    batch_size=16,
    epochs=10,
)


@pytest.fixture(scope="session")
def begin():
    """The state before the first step, compiled and kept: one for each configuration of the session."""

    @functools.cache
    def state(config):
        return jax.device_get(jax.jit(lambda: init_state(config))())

    # A copy on the device: the step may be given it for good.
    return lambda config: jax.tree.map(jnp.array, state(config))


@pytest.fixture
def tiny():
    """Makes a configuration; fields of `optim` go by their own names."""

    def make(**changes):
        optim = {field.name for field in dataclasses.fields(OptimConfig)} & changes.keys()
        return dataclasses.replace(
            TINY,
            optim=dataclasses.replace(TINY.optim, **{name: changes.pop(name) for name in optim}),
            **changes,
        )

    return make


@pytest.fixture
def batches():
    """Makes the batches of the first steps: bytes with some structure, positions in the stream."""

    def make(count, size=TINY.batch_size):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (count, size, 8, 8, 1), np.uint8)
        positions = np.arange(count * size, dtype=np.uint32).reshape(count, size)
        return [Batch(*pair) for pair in zip(images, positions, strict=True)]

    return make


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, begin):
    """A folder with three checkpoints, and the states that they hold."""
    # The fixture `tiny` is remade for each test; a session's needs its own.
    config = dataclasses.replace(TINY, optim=dataclasses.replace(TINY.optim, ema_decay=0.5), keep=len(STEPS))
    workdir = tmp_path_factory.mktemp("run")
    states = {step: state_at(begin(config), step) for step in STEPS}
    with contextlib.closing(Checkpoints(workdir, config)) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state)
    return config, workdir, states


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of it, to be broken."""
    config, workdir, states = finished_run
    shutil.copytree(workdir, tmp_path / "run")
    return config, tmp_path / "run", states
