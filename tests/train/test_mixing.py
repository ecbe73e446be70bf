"""Mixing and erasing against timm's own, as arrays, and by hand what no library has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_jax.config import MixConfig
from mae_jax.train.mixing import cutmix, cutmix_box, erase, erased_box, mix, mixup, neighbours, smooth_targets
from tests.peers import peer

CLASSES = 6
RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((8, 12, 10, 3)).astype(np.float32)
LABELS = RNG.integers(0, CLASSES, 8)

# timm mixes row i with row 7 - i, we mix row 2 i with row 2 i + 1.
AS_TIMM = [0, 7, 1, 6, 2, 5, 3, 4]


@pytest.fixture(scope="module")
def timm_mixup():
    return peer("timm.data").Mixup


def targets(labels=LABELS, smoothing=0.1):
    return smooth_targets(jnp.asarray(labels), CLASSES, smoothing, "float32")


def timms(make, monkeypatch, share, use_cutmix, centre=(0, 0)):
    """timm's images (B, H, W, C) and targets, with these draws, in our order of rows."""
    mixer = make(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    monkeypatch.setattr(mixer, "_params_per_batch", lambda: (share, use_cutmix))
    drawn = iter(centre)
    monkeypatch.setattr(np.random, "randint", lambda low, high, size=None: next(drawn))
    order = np.argsort(AS_TIMM)
    torch = pytest.importorskip("torch")
    images = torch.from_numpy(IMAGES[order]).movedim(-1, 1).contiguous()
    # Its targets are made on the GPU by default; on a CPU they are the same.
    monkeypatch.setattr("timm.data.mixup.one_hot", _one_hot)
    mixed, goal = mixer(images, torch.from_numpy(LABELS[order]))
    return mixed.movedim(1, -1).numpy()[AS_TIMM], goal.numpy()[AS_TIMM]


def _one_hot(x, num_classes, on_value=1.0, off_value=0.0, **device):
    return pytest.importorskip("torch").full((len(x), num_classes), off_value).scatter_(1, x.view(-1, 1), on_value)


@pytest.mark.parametrize("share", [0.3, 0.85])
def test_mixup_is_timms(timm_mixup, monkeypatch, share):
    ours = mixup(jnp.asarray(IMAGES), targets(), jnp.float32(share))
    for mine, theirs in zip(ours, timms(timm_mixup, monkeypatch, share, False), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("share", "centre"), [(0.3, (1, 8)), (0.6, (6, 5)), (0.97, (11, 0)), (1.0, (3, 3)), (0.0, (6, 5))]
)
def test_cutmix_is_timms(timm_mixup, monkeypatch, share, centre):
    """Boxes inside, over an edge, empty and whole."""
    place = (jnp.array(centre) + 0.5) / jnp.array(IMAGES.shape[1:3])
    box = cutmix_box(jnp.float32(share), place, *IMAGES.shape[1:3])
    ours = cutmix(jnp.asarray(IMAGES), targets(), box)
    theirs = timms(timm_mixup, monkeypatch, share, True, centre)
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=1e-6)


def test_smoothing_is_pytorchs():
    torch = pytest.importorskip("torch")
    logits = RNG.standard_normal((8, CLASSES)).astype(np.float32)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(LABELS), label_smoothing=0.1
    )
    ours = -(np.asarray(targets()) * np.asarray(jax.nn.log_softmax(logits))).sum(1).mean()
    assert ours == pytest.approx(expected.item(), rel=1e-6)


def test_partners_are_mutual():
    rows = jnp.arange(8.0)
    assert neighbours(rows).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    np.testing.assert_array_equal(neighbours(neighbours(jnp.asarray(IMAGES))), IMAGES)


@pytest.mark.parametrize("config", [MixConfig(mixup=0.8), MixConfig(cutmix=1.0), MixConfig(mixup=0.8, cutmix=1.0)])
def test_every_draw_keeps_targets_whole(config):
    """Shares sum up to one, and differ from draw to draw; with both on, both kinds come."""
    run = jax.jit(lambda key: mix(jnp.asarray(IMAGES), targets(smoothing=0), key, config))
    kinds, seen = set(), set()
    for number in range(24):
        images, goal = run(jax.random.key(number))
        np.testing.assert_allclose(goal.sum(1), 1, atol=1e-6)
        taken = np.isclose(images, IMAGES).all(-1) | np.isclose(images, neighbours(jnp.asarray(IMAGES))).all(-1)
        kinds.add("cutmix" if taken.all() else "mixup")
        seen.add(float(images[0].sum()))
    assert len(seen) > 12
    assert kinds == {"mixup"} if not config.cutmix else ("cutmix" in kinds and (not config.mixup or "mixup" in kinds))


def test_nothing_to_mix_leaves_everything():
    images, goal = mix(jnp.asarray(IMAGES), targets(), jax.random.key(0), MixConfig())
    assert images is not None
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(goal, targets())


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 40), st.integers(4, 40), st.integers(0, 2**20))
def test_an_erased_box_is_a_rectangle_of_the_area_asked_for(height, width, seed):
    drawn = np.random.default_rng(seed).random((10, 4)).astype(np.float32)
    inside = np.asarray(erased_box(jnp.asarray(drawn), height, width))
    if not inside.any():
        return
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    assert inside.sum() == len(rows) * len(columns)
    assert (np.diff(rows) == 1).all()
    assert (np.diff(columns) == 1).all()
    assert len(rows) < height
    assert len(columns) < width
    # Of the first that fits, each side rounded.
    area, aspect = height * width * (0.02 + (1 / 3 - 0.02) * drawn[:, 0]), np.exp((1 - 2 * drawn[:, 1]) * np.log(0.3))
    sides = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
    first = np.flatnonzero((sides[0] < height) & (sides[1] < width))[0]
    assert abs(len(rows) - sides[0][first]) <= 1
    assert abs(len(columns) - sides[1][first]) <= 1


def test_erasing_belongs_to_the_position():
    """The same image at the same position whatever stands beside it; a quarter of many; noise is normal."""
    images = jnp.zeros((64, 16, 16, 3))
    positions = jnp.arange(64, dtype=jnp.uint32)
    erased = np.asarray(erase(images, jax.random.key(0), positions, 0.25))
    touched = (erased != 0).any(axis=(1, 2, 3))
    assert 8 <= touched.sum() <= 24
    assert np.std(erased[erased != 0]) == pytest.approx(1, abs=0.05)
    np.testing.assert_array_equal(erase(images[:8], jax.random.key(0), positions[32:40], 0.25), erased[32:40])
    np.testing.assert_array_equal(erase(images, jax.random.key(0), positions, 0.0), images)


def test_a_rectangle_is_smaller_than_the_image_both_ways():
    """timm draws again where a side is as long as the image's; its own test is `<`."""
    # Area and aspect of a rectangle of 4 x 2 in an image of 4 x 6, which is too high; then of 2 x 2, which fits.
    low, high = 0.02, 1 / 3

    def uniforms(height, width):
        area = (height * width / 24 - low) / (high - low)
        aspect = (1 - np.log(height / width) / np.log(0.3)) / 2
        return [area, aspect, 0.5, 0.0]

    inside = np.asarray(erased_box(jnp.asarray([uniforms(4, 2), uniforms(2, 2)]), 4, 6))
    assert inside.sum() == 4
    assert inside[1:3, :2].all()
    assert not np.asarray(erased_box(jnp.asarray([uniforms(4, 2)]), 4, 6)).any()
