"""Colour jitter against torchvision's, given the same draws."""

import numpy as np
import pytest
from PIL import Image

from mae_jax.data.images.distort import color_jitter
from mae_jax.rng import host_generator
from tests.data.photographs import photograph
from tests.peers import peer

PHOTO = Image.fromarray(photograph(30, 41))


@pytest.fixture(scope="module")
def torchvision_jitter():
    return peer("torchvision.transforms").ColorJitter


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("strength", [0.1, 0.4, 1.0, 2.5])
def test_jitter_is_torchvisions(torchvision_jitter, monkeypatch, mode, strength):
    image, changed = PHOTO.convert(mode), 0
    for position in range(24):
        draws = host_generator(0, "jitter", position)
        order = draws.permutation(3)
        theirs = torchvision_jitter(strength, strength, strength)
        factors = [float(draws.uniform(*getattr(theirs, name))) for name in ("brightness", "contrast", "saturation")]
        monkeypatch.setattr(theirs, "get_params", lambda *_, drawn=(order, *factors, None): drawn)
        found = np.asarray(color_jitter(image, strength, host_generator(0, "jitter", position)))
        assert (found == np.asarray(theirs(image))).all()
        changed += (found != np.asarray(image)).any()
    assert changed > 12


def test_every_order_comes():
    orders = {tuple(host_generator(0, "jitter", position).permutation(3).tolist()) for position in range(60)}
    assert len(orders) == 6
