"""Parts of sources, and the split that a classifier is trained and evaluated on."""

import numpy as np
import pytest
from PIL import Image

from mae_jax.data.sources.source import open_source
from mae_jax.data.sources.split import Subset, split_for_training
from tests.refusals import refused


def folder(tmp_path, splits):
    """split -> class -> how many images."""
    for split, classes in splits.items():
        for name, count in classes.items():
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(np.full((4, 4), number, np.uint8)).save(place / f"{number}.png")
    return f"folder:{tmp_path}"


def split(data, holdout=5):
    return split_for_training(lambda name: open_source(data, 1, name), data, holdout)


def test_a_held_out_part_where_there_is_no_val():
    train, val = split("digits")
    whole = open_source("digits", 1)
    assert (len(train), len(val)) == (1437, 360)
    assert val.name(2) == "digits[10]"
    assert {train.name(i) for i in range(1437)}.isdisjoint(val.name(i) for i in range(360))
    assert [val.label(i) for i in range(360)] == [whole.label(i) for i in range(0, 1797, 5)]
    np.testing.assert_array_equal(np.asarray(val.load(3)), np.asarray(whole.load(15)))


def test_classes_of_val_are_numbered_as_in_train(tmp_path):
    train, val = split(folder(tmp_path, {"train": {"ant": 1, "bee": 1, "cow": 2}, "val": {"bee": 1, "cow": 2}}))
    assert train.class_names == val.class_names == ("ant", "bee", "cow")
    assert [val.label(i) for i in range(3)] == [1, 2, 2]


@pytest.mark.parametrize(
    ("splits", "field", "words"),
    [
        ({"train": {"ant": 1, "bee": 1}, "val": {"ant": 1, "dog": 1}}, "data", ["classes that train has not: dog"]),
        ({"train": {"ant": 1, "bee": 1}}, "holdout", ["2 images, fewer than holdout 5"]),
        ({"train": {"ant": 1, "bee": 1}, "val": {".": 2}}, "data", ["val of ", " has no classes"]),
    ],
)
def test_refused(tmp_path, splits, field, words):
    with refused(field, *words):
        split(folder(tmp_path, splits))


def test_images_without_classes_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
    with refused("data", "has no classes"):
        split(f"folder:{tmp_path}")


def test_chosen_in_any_order():
    some = Subset(open_source("digits", 1), [7, 7, 0])
    assert [some.name(i) for i in range(len(some))] == ["digits[7]", "digits[7]", "digits[0]"]
