"""Files of features: whole or not there, and read without trust."""

import os

import numpy as np
import pytest

from mae_jax.errors import StatedError
from mae_jax.evaluation.features import FeatureFile, load_features, save_features
from mae_jax.evaluation.knn import compare_files
from tests.refusals import refused

OF = {"source": "/runs/a", "step": 12, "pooling": "mean", "block": None, "data": "digits", "split": "train"}


def found(count=6, **changes):
    random = np.random.default_rng(count)
    values = random.normal(size=(count, 4)).astype(np.float32)
    labels = (np.arange(count) % 3 - 1).astype(np.int32)
    names = tuple(f"größe {i}\n.png" for i in range(count))
    return FeatureFile(values, labels, ("a", "b"), names, OF)._replace(**changes)


def test_what_is_written_is_read_back(tmp_path):
    save_features(tmp_path / "x.npz", found())
    save_features(tmp_path / "x.npz", found(5))  # in place of the first
    back = load_features(tmp_path / "x.npz")
    expected = found(5)
    np.testing.assert_array_equal(back.features, expected.features)
    np.testing.assert_array_equal(back.labels, expected.labels)
    assert back[2:] == expected[2:]
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    save_features(tmp_path / "x.npz", found())
    before = (tmp_path / "x.npz").read_bytes()

    def full(path, **arrays):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with refused("out", "x.npz cannot be written: No space left on device"):
        save_features(tmp_path / "x.npz", found(7))
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]
    assert (tmp_path / "x.npz").read_bytes() == before


def test_where_no_file_can_be(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    with refused("out", "x.npy does not end in .npz"):
        save_features(tmp_path / "x.npy", found())
    for path, words in (
        (tmp_path / "none" / "x.npz", "none is no folder that can be written to"),
        (tmp_path / "folder.npz", "is a folder: choose another name"),
    ):
        with pytest.raises(StatedError, match=words):
            save_features(path, found())


def test_a_file_that_could_run_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    arrays = found()._asdict() | {"of": "{}", "labels": np.array([Trap()], object)}
    np.savez(tmp_path / "x.npz", **arrays)
    with refused("x.npz", "Python objects"):
        load_features(tmp_path / "x.npz")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"features": np.zeros((6, 4))}, "features", "float64 (6, 4), not float32"),
        ({"features": np.zeros(6, np.float32)}, "features", "float32 (6,)"),
        ({"labels": np.zeros(5, np.int32)}, "labels", "int32 (5,)"),
        ({"labels": np.zeros(6)}, "labels", "float64 (6,)"),
        ({"names": ("a",)}, "names", "1, of 6 images"),
        ({"labels": np.full(6, 2, np.int32)}, "labels", "2 .. 2 are not those of 2 classes"),
        ({"labels": np.full(6, -2, np.int32)}, "labels", "-2 .. -2"),
        ({"of": [1]}, "of", "[1]"),
    ],
)
def test_other_contents_are_refused(tmp_path, changes, field, words):
    save_features(tmp_path / "x.npz", found(**changes))
    with refused(field, words):
        load_features(tmp_path / "x.npz")


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "x.npz"
    with refused("x.npz", "cannot be read: No such file"):
        load_features(file)
    np.savez(file, features=np.zeros((2, 2), np.float32), names=np.array(["a"]))
    with refused("labels", "['labels', 'class_names', 'of']"):
        load_features(file)
    with file.open("wb") as stream:
        np.save(stream, np.zeros(3))
    with refused("x.npz", "no file of features"):
        load_features(file)
    save_features(file, found())
    content = file.read_bytes()
    for damaged in (content[:-40], content[:400], b"", content.replace(b"\x93NUMPY", b"\x93NUMPX")):
        file.write_bytes(damaged)
        with refused("x.npz"):
            load_features(file)


def test_features_of_two_kinds_do_not_compare(tmp_path):
    bank = tmp_path / "bank.npz"
    save_features(bank, found(9))
    for name, value in {"source": "/runs/b", "step": 13, "pooling": "class", "block": 3}.items():
        save_features(tmp_path / "other.npz", found(6, of=OF | {name: value}))
        with refused(name, f"{OF[name]} and {value}"):
            compare_files(bank, tmp_path / "other.npz", k=1, temperature=None)
    save_features(tmp_path / "other.npz", found(6, features=np.zeros((6, 5), np.float32)))
    with refused("width", "4 and 5"):
        compare_files(bank, tmp_path / "other.npz", k=1, temperature=None)


def test_classes_of_two_files_go_by_name(tmp_path):
    values = np.eye(4, dtype=np.float32)
    bank, queries = tmp_path / "bank.npz", tmp_path / "queries.npz"
    four = found(4, features=values, class_names=("a", "b", "c"), labels=np.array([0, 1, 2, -1], np.int32))
    save_features(bank, four)
    # b and c have other numbers here.
    save_features(queries, four._replace(class_names=("b", "c"), labels=np.array([-1, 0, 1, 0], np.int32)))
    result = compare_files(bank, queries, k=1, temperature=0.07)
    assert result == f"1-NN accuracy, 3 images of {queries} among 3: 66.67%. Left out: 2 have no class"
    assert compare_files(bank, None, k=2, temperature=None).startswith(
        "2-NN accuracy, each of 3 images by the others: "
    )
    save_features(queries, four._replace(class_names=("b", "c", "d")))
    with refused("classes", "queries.npz", "bank.npz", ": d"):
        compare_files(bank, queries, k=1, temperature=None)
    save_features(queries, four._replace(class_names=("a",), labels=np.zeros(4, np.int32)))
    with refused("queries.npz"):
        compare_files(queries, bank, k=1, temperature=None)
