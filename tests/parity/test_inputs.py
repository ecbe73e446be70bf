"""The reference's inputs are as documented, and a mistake planted in mae_jax's shows at the stage where it belongs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from mae_jax import rng
from mae_jax.config import AugmentConfig, MixConfig, PretrainConfig
from mae_jax.data import stream
from mae_jax.data.images import box
from mae_jax.port.compare import Comparison
from mae_jax.train import classification, crops, mixing
from parity import input_stages, torch_inputs
from parity.input_stages import INPUTS
from parity.models import SMALL
from parity.sides import Reference
from parity.stages import run

Patch = pytest.MonkeyPatch
SEED = 3


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(SMALL["tiny"], "float32", SEED)


# --- what the reference computes --------------------------------------------------------------------------------------


SIDES = st.integers(1, 200)


@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(1, 3), st.sampled_from([0, 7, 2**32 - 200]))
def test_an_epoch_shows_every_image_once(images, seed, repeats, epoch):
    epoch %= 2**32 // (images * repeats)  # one that is within the stream
    start = epoch * images * repeats
    shown = torch_inputs.order(images, seed, range(start, start + images * repeats), repeats)
    assert sorted(shown[::repeats]) == list(range(images))
    assert all(len(set(shown[group : group + repeats])) == 1 for group in range(0, len(shown), repeats))


@given(SIDES, SIDES, st.sampled_from(["random", "fixed", "center"]), st.integers(0, 2**32 - 1))
def test_a_box_lies_within_its_picture(height, width, crop, position):
    config = PretrainConfig(model=input_stages.MODEL, augment=AugmentConfig(crop=crop))
    left, top, right, bottom = torch_inputs.crop_box((height, width), config, position)
    assert 0 <= left < right <= width + 1e-9
    assert 0 <= top < bottom <= height + 1e-9


def test_boxes_are_those_computed_by_hand():
    generator = np.random.default_rng(0)
    crop = torch_inputs.random_resized_crop
    assert crop(generator, 120, 2, (1, 1), (3 / 4, 4 / 3)) == (0, 58, 2, 61)  # nothing fits: 2 / 3 is the nearest
    assert crop(generator, 3, 120, (1, 1), (3 / 4, 4 / 3)) == (58, 0, 62, 3)
    assert crop(generator, 30, 40, (1, 1), (4 / 3, 4 / 3)) == (0, 0, 40, 30)
    # 40 x 80 that covers 32 x 24 is 32 x 64, of which columns 20 to 44 are the middle.
    assert torch_inputs.crop_of_scaled((40, 80), (32, 24), (32, 24), None) == (25, 0, 55, 40)


def test_a_whole_square_is_cut_as_it_is():
    square = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    assert np.array_equal(torch_inputs.device_crop(square, (0, 0, 20, 20), False, (20, 20)), square)
    assert np.array_equal(torch_inputs.device_crop(square, (4, 2, 14, 12), True, (10, 10)), square[2:12, 13:3:-1])


def test_an_erased_rectangle_has_the_published_size():
    drawn = [torch_inputs.erased(0, position, 0.25, (224, 224), "float32")[0] for position in range(400)]
    erased = [rectangle for rectangle in drawn if rectangle is not None]
    assert 0.2 < len(erased) / len(drawn) < 0.3
    for each in erased:
        rows, columns = each.bottom - each.top, each.right - each.left
        assert 0 <= each.top < each.bottom <= 224
        assert 0 <= each.left < each.right <= 224
        assert 0.019 < rows * columns / 224**2 < 0.34
        assert 0.29 < rows / columns < 3.4


def test_targets_and_boxes_are_those_computed_by_hand():
    targets = torch_inputs.smoothed(torch.tensor([2, 0]), 4, 0.1, torch.float64)
    assert torch.allclose(targets, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]).double())
    assert torch_inputs.cutmix_box(0.75, (0.5, 0.5), 32, 24) == torch_inputs.Rectangle(8, 24, 6, 18)
    assert torch_inputs.cutmix_box(0.0, (0.0, 0.999), 32, 24) == torch_inputs.Rectangle(0, 16, 11, 24)
    images = torch.arange(4.0)[:, None, None, None].expand(4, 1, 2, 2)
    mixed, _ = torch_inputs.mixup(images, torch.eye(4), 0.75)
    assert mixed[:, 0, 0, 0].tolist() == [0.25, 0.75, 2.25, 2.75]


def test_either_way_to_mix_is_taken_as_often_as_it_should():
    mix = MixConfig(mixup=0.8, cutmix=1.0, cutmix_share=0.3)
    with jax.enable_x64(False):
        kinds = [torch_inputs.mixing(mix, 0, step, "float32").kind for step in range(300)]
    assert 0.24 < kinds.count("cutmix") / len(kinds) < 0.36


# --- mistakes ---------------------------------------------------------------------------------------------------------


def mixed_alike_at_every_step(patch: Patch) -> None:
    inputs = classification.Classification.inputs
    planted = lambda self, batch, pixels, step: inputs(self, batch, pixels, jnp.zeros_like(step))  # noqa: E731
    patch.setattr(classification.Classification, "inputs", planted)


def erased_after_mixing(patch: Patch) -> None:
    arguments = []

    def later(images, *rest):
        arguments[:] = rest
        return images

    def planted(images, targets, key, config):
        images, targets = mixing.mix(images, targets, key, config)
        return mixing.erase(images, *arguments), targets

    patch.setattr(classification, "erase", later)
    patch.setattr(classification, "mix", planted)


def branches_exchanged(patch: Patch) -> None:
    cond = jax.lax.cond
    patch.setattr(jax.lax, "cond", lambda predicate, one, other: cond(predicate, other, one))


def mixup_with_the_alpha_of_cutmix(patch: Patch) -> None:
    def planted(images, targets, key, config):
        both = config.mixup > 0 and config.cutmix > 0
        return mixing.mix(images, targets, key, replace(config, mixup=config.cutmix) if both else config)

    patch.setattr(classification, "mix", planted)


def box_from_the_corner(patch: Patch) -> None:
    cutmix_box = mixing.cutmix_box
    patch.setattr(mixing, "cutmix_box", lambda share, centre, *size: cutmix_box(share, 0 * centre, *size))


def unequal_neighbours(patch: Patch) -> None:
    patch.setattr(mixing, "neighbours", lambda x: jnp.roll(x, 1, axis=0))


def noise_of_the_seed_alone(patch: Patch) -> None:
    draw = rng.example_uniforms
    patch.setattr(rng, "example_uniforms", lambda key, positions, count: draw(key, 0 * jnp.asarray(positions), count))


def positions_of_31_bits(patch: Patch) -> None:
    draw = rng.example_uniforms
    planted = lambda key, positions, count: draw(key, jnp.asarray(positions) & 0x7FFFFFFF, count)  # noqa: E731
    patch.setattr(rng, "example_uniforms", planted)


def flips_a_quarter(patch: Patch) -> None:
    for module in (box, stream):
        patch.setattr(module, "flips", lambda config, flip: config.flip and flip.random() < 0.25)


def aspect_inverted(patch: Patch) -> None:
    patch.setattr(box, "math", SimpleNamespace(**vars(math) | {"exp": lambda x: math.exp(-x)}))


def scaled_to_256_of_any_size(patch: Patch) -> None:
    covering = box.covering_size
    patch.setattr(box, "covering_size", lambda size, least: covering(size, tuple(map(min, least, (36, 26)))))


def order_without_the_seed(patch: Patch) -> None:
    order = stream.Order
    patch.setattr(stream, "Order", lambda images, seed: order(images, 0))


def same_order_every_epoch(patch: Patch) -> None:
    patch.setattr(stream.Order, "__getitem__", lambda self, group: int(self._shuffled[group % self.images]))


def crops_half_a_pixel_off(patch: Patch) -> None:
    weights = crops.box_weights
    patch.setattr(crops, "box_weights", lambda start, stop, *sizes: weights(start + 0.5, stop, *sizes))


def turned_upside_down(patch: Patch) -> None:
    patch.setattr(stream, "cv2", SimpleNamespace(flip=lambda pixels, axis: pixels[::-1]))


def erased_aspect_halved(patch: Patch) -> None:
    patch.setattr(mixing, "ERASED_ASPECT", 0.6)


def uniform_noise_in_erased_boxes(patch: Patch) -> None:
    patch.setattr(jax.random, "normal", jax.random.uniform)


def smoothed_over_the_other_classes(patch: Patch) -> None:
    smooth = mixing.smooth_targets

    def planted(labels, classes, smoothing, dtype):
        return smooth(labels, classes, smoothing * classes / (classes - 1), dtype)

    patch.setattr(classification, "smooth_targets", planted)


@dataclass(frozen=True)
class Mistake:
    plant: Callable[[Patch], None]
    stage: Callable
    tensors: str  # how the first one begins that departs
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.plant.__name__


def other_number(name: str, stage: Callable, tensors: str) -> Mistake:
    return Mistake(lambda patch: patch.setitem(rng.STREAMS, name, 99), stage, tensors, f"other number of {name}")


MISTAKES = [
    Mistake(order_without_the_seed, input_stages.order, "images, seed 3, 1 in a row, step 0"),
    Mistake(same_order_every_epoch, input_stages.order, "images, seed 3, 1 in a row, step 0"),
    other_number("order", input_stages.order, "images, seed 3, 1 in a row, step 0"),
    Mistake(aspect_inverted, input_stages.boxes, "random, seed 3"),
    Mistake(scaled_to_256_of_any_size, input_stages.boxes, "fixed, seed 3"),
    other_number("crop", input_stages.boxes, "random, seed 3"),
    Mistake(flips_a_quarter, input_stages.boxes, "mirrored, seed 3"),
    other_number("flip", input_stages.boxes, "mirrored, seed 3"),
    Mistake(turned_upside_down, input_stages.host_crops, "random, flips"),
    Mistake(crops_half_a_pixel_off, input_stages.device_crops, "pixels, random"),
    Mistake(noise_of_the_seed_alone, input_stages.pretraining_inputs, "noise"),
    Mistake(positions_of_31_bits, input_stages.pretraining_inputs, "noise"),
    other_number("mask", input_stages.pretraining_inputs, "noise"),
    Mistake(erased_aspect_halved, input_stages.erasing, "rectangles, chance 0.5"),
    Mistake(uniform_noise_in_erased_boxes, input_stages.erasing, "images, chance 0.5"),
    other_number("erase", input_stages.erasing, "rectangles, chance 0.5"),
    Mistake(mixed_alike_at_every_step, input_stages.mixing, "share, mixup, step 1"),
    Mistake(unequal_neighbours, input_stages.mixing, "with whom, mixup, step 0"),
    Mistake(box_from_the_corner, input_stages.mixing, "box, cutmix, step 0"),
    Mistake(branches_exchanged, input_stages.mixing, "whether by a box, both, cutmix never"),
    Mistake(mixup_with_the_alpha_of_cutmix, input_stages.mixing, "share, both, cutmix never"),
    other_number("mix", input_stages.mixing, "share, mixup, step 0"),
    Mistake(smoothed_over_the_other_classes, input_stages.classification_inputs, "targets, step 0"),
    Mistake(erased_after_mixing, input_stages.classification_inputs, "images, step 0"),
    other_number("drop_path", input_stages.classification_inputs, "drop path's uniforms"),
]


def departures(reference: Reference, stage: Callable) -> list[Comparison]:
    (results,) = run([reference], [stage.__name__])
    return [result for result in results if not result.passed]


@pytest.mark.parametrize("stage", INPUTS, ids=lambda stage: stage.__name__)
def test_nothing_departs_without_a_mistake(reference, stage):
    assert departures(reference, stage) == []


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_mistake_is_caught_where_it_belongs(reference, monkeypatch, mistake):
    mistake.plant(monkeypatch)
    found = departures(reference, mistake.stage)
    assert found, "the comparison did not notice"
    assert found[0].tensor.startswith(mistake.tensors)


@pytest.mark.extended
@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_no_stage_before_departs(reference, monkeypatch, mistake):
    mistake.plant(monkeypatch)
    for stage in INPUTS[: INPUTS.index(mistake.stage)]:
        assert departures(reference, stage) == []


def test_exchanged_branches_are_caught_at_both_ends(reference, monkeypatch):
    """Where either is certain the result is wrong whatever was drawn."""
    branches_exchanged(monkeypatch)
    whether = {result.tensor for result in departures(reference, input_stages.mixing) if "whether" in result.tensor}
    assert {f"whether by a box, both, cutmix {often}, step 0" for often in ("never", "always")} <= whether
