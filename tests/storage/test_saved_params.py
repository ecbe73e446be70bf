"""Parameters come out of checkpoints as they went in, or the checkpoint is refused."""

import contextlib
import dataclasses
import gc

import pytest

from mae_jax.config import TransformerConfig
from mae_jax.errors import StatedError
from mae_jax.storage.checkpoints import Checkpoints
from mae_jax.storage.loading import load_params
from tests.storage.saved_runs import DAMAGE, another_state, assert_same_bits, state_at
from tests.tiny import TINY


def test_a_run_with_cudnn_is_read_where_there_is_none(tmp_path, begin):
    wide = TransformerConfig(width=16, depth=1, heads=2)
    plain = dataclasses.replace(TINY.model, dtype="bfloat16", encoder=wide, decoder=wide)
    state = begin(dataclasses.replace(TINY, model=plain))
    recorded = dataclasses.replace(TINY, model=dataclasses.replace(plain, attention="cudnn"))
    with contextlib.closing(Checkpoints(tmp_path, recorded)) as checkpoints:
        checkpoints.save(1, state)
    config, params, _ = load_params(tmp_path)
    assert config.model == plain
    assert_same_bits(params, state.params)


def test_parameters_of_a_run_and_of_one_checkpoint(run):
    """Of a run that keeps one, the running average."""
    config, workdir, states = run
    for given, step in {workdir: 6, workdir / "checkpoints" / "4": 4}.items():
        found_config, params, found_step = load_params(given)
        assert (found_config, found_step) == (config, step)
        assert_same_bits(params, states[step].average)


def test_parameters_of_a_run_without_an_average(tmp_path, tiny, begin):
    config = tiny()
    state = state_at(begin(config), 3)
    with contextlib.closing(Checkpoints(tmp_path, config)) as checkpoints:
        checkpoints.save(3, state)
    assert_same_bits(load_params(tmp_path)[1], state.params)


@pytest.mark.parametrize(
    "damage", [way for way in DAMAGE if way is not another_state], ids=lambda damage: damage.__name__
)
def test_parameters_of_a_broken_checkpoint_are_refused(run, damage, caplog):
    _, workdir, _ = run
    folder = workdir / "checkpoints" / "4"
    damage(folder)
    with pytest.raises(StatedError) as caught:
        load_params(folder)
    assert caught.value.field in ("checkpoint", "record")
    assert str(folder) in str(caught.value)
    gc.collect()
    assert caplog.records == []  # what failed beside the first read does not speak up later
