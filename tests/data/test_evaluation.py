"""Centre crops in order."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mae_jax.data.evaluation import evaluation_batches, load_images, load_samples
from mae_jax.data.images.decode import to_array
from mae_jax.data.images.resize import center_crop
from mae_jax.data.sources.source import open_source
from tests.refusals import refused


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_once_in_order(make_folder: Callable[..., Path], workers: int) -> None:
    source = open_source(f"folder:{make_folder('photos', 21, broken=(4, 20))}", 3)
    with evaluation_batches(source, (16, 24), 3, 6, workers=workers) as batches:
        rows = list(batches)
    assert [batch["index"].tolist() for batch in rows] == [[0, 1, 2, 3, 5], [*range(6, 12)], [*range(12, 18)], [18, 19]]
    assert [batch["broken"].tolist() for batch in rows] == [[4], [], [], [20]]
    for batch in rows:
        for image, label, index in zip(batch["image"], batch["label"], batch["index"].tolist(), strict=True):
            assert (image == to_array(center_crop(source.load(index), (16, 24)))).all()
            assert label == source.label(index)


def test_batches_of_several_parts() -> None:
    with evaluation_batches(open_source("digits", 1), (8, 8), 1, 500) as batches:
        sizes = [batch["image"].shape for batch in batches]
    assert sizes == [(500, 8, 8, 1)] * 3 + [(297, 8, 8, 1)]


def test_cifar(cifar10_val: Path) -> None:
    source = open_source(f"folder:{cifar10_val}", 3, "val")
    with evaluation_batches(source, (32, 32), 3, 250) as batches:
        labels = np.concatenate([batch["label"] for batch in batches])
    assert len(source.class_names) == 10
    assert len(labels) == len(source) == 4999  # the archive lacks one truck


def test_images_by_path(make_folder: Callable[..., Path]) -> None:
    folder = make_folder("photos", 4, broken=(3,))
    files = [str(folder / "b/002.jpg"), str(folder / "a/000.jpg")]
    images = load_images(files, (16, 24), 1)
    assert images.shape == (2, 16, 24, 1)
    assert images.dtype == np.uint8
    with refused("images", "003.jpg does not decode: not an image", "write it again"):
        load_images([*files, str(folder / "b/003.jpg")], (16, 24), 3)
    with refused("images", "missing.jpg does not decode: No such file"):
        load_images([str(folder / "missing.jpg")], (16, 24), 3)


def test_a_share_of_the_shorter_side(make_folder: Callable[..., Path]) -> None:
    folder = make_folder("photos", 2)
    source = open_source(f"folder:{folder}", 3)
    expected = np.stack([to_array(center_crop(source.load(i), (16, 24), 0.875)) for i in range(2)])
    with evaluation_batches(source, (16, 24), 3, 2, share=0.875) as batches:
        (batch,) = batches
    assert (batch["image"] == expected).all()
    assert (load_samples(source, range(2), 2, (16, 24), 0.875) == expected).all()
    assert (load_images([str(folder / "a/000.jpg"), str(folder / "b/001.jpg")], (16, 24), 3, 0.875) == expected).all()
    assert (load_samples(source, range(2), 2, (16, 24)) != expected).any()


def test_samples_pass_over_broken_files(make_folder: Callable[..., Path]) -> None:
    source = open_source(f"folder:{make_folder('photos', 6, broken=(1, 2))}", 3)
    images = load_samples(source, [2, 3, 1, 0, 5], 2, (16, 24))
    assert (images == [to_array(center_crop(source.load(i), (16, 24))) for i in (3, 0)]).all()
    assert len(load_samples(source, [2, 3], 9, (16, 24))) == 1
    with refused("data", "no image decodes; the first: ", "001.jpg does not decode", "Remove it"):
        load_samples(source, [1, 2], 2, (16, 24))
