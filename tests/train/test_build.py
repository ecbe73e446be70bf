"""How long a run is."""

import pytest

from mae_jax.config import PretrainConfig
from mae_jax.train.build import Length, run_length
from tests.refusals import refused


@pytest.mark.parametrize(
    ("given", "examples", "length"),
    [
        ({"epochs": 3}, 100, Length(30, 10.0, 3.0)),
        ({"epochs": 3}, 105, Length(32, 10.5, 32 / 10.5)),  # the last examples count
        ({"epochs": 0.25}, 100, Length(3, 10.0, 0.3)),
        ({"epochs": 0.001}, 100, Length(1, 10.0, 0.1)),
        ({"epochs": 3, "steps": 12}, 100, Length(12, 10.0, 1.2)),  # the curve is as long as the run
    ],
)
def test_a_run_is_its_steps(given, examples, length):
    assert run_length(PretrainConfig(batch_size=10, **given), examples) == length


def test_a_position_is_of_32_bits():
    config = PretrainConfig(batch_size=2**20, steps=2**12 - 1)
    assert run_length(config, 2**20).steps == 2**12 - 1
    with refused("steps", "4096", "4294967295"):
        run_length(PretrainConfig(batch_size=2**20, steps=2**12), 2**20)
