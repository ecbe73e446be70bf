"""TensorBoard reads what was written, and nothing of steps that were taken again."""

import io

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mae_jax.runs.log import Events


def read(folder):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_tensorboard_reads_numbers_and_pictures(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    events = Events(tmp_path / "tensorboard", 0)
    for step in (1, 2, 3):
        events.scalar("loss", step, 0.1 * step)
    events.picture("reconstruction", 3, picture)
    found = read(tmp_path / "tensorboard")  # not closed: what is killed has written all the same
    events.close()
    assert [(scalar.step, scalar.value) for scalar in found.Scalars("loss")] == [
        (step, pytest.approx(0.1 * step)) for step in (1, 2, 3)
    ]
    (image,) = found.Images("reconstruction")
    assert (image.step, image.height, image.width) == (3, 5, 7)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), picture)


def test_a_restart_hides_what_it_takes_again(tmp_path):
    for start, steps in ((0, (1, 2, 3)), (1, (2, 3))):
        events = Events(tmp_path, start)
        for step in steps:
            events.scalar("loss", step, 10.0 * start + step)
        events.close()
    assert len(list(tmp_path.iterdir())) == 2
    assert [(scalar.step, scalar.value) for scalar in read(tmp_path).Scalars("loss")] == [(1, 1), (2, 12), (3, 13)]
