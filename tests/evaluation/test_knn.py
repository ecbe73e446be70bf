"""k-nearest neighbours against a plain loop, scikit-learn and Lightly."""

import contextlib
import dataclasses
import importlib.util
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from mae_jax.evaluation.knn import Neighbours, Sizes, compare_with_untrained, knn_accuracy, knn_predictions, vote
from mae_jax.storage.checkpoints import Checkpoints
from mae_jax.train.step import init_state
from tests.refusals import refused
from tests.tiny import TINY


def clouds(count, seed, classes=4, width=6):
    """Features around one direction a class, near enough to be mixed up."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(classes, width))
    labels = rng.integers(0, classes, count).astype(np.int32)
    spread = rng.normal(size=(count, width)) * rng.uniform(0.5, 2, (count, 1))
    return (centres[labels] + spread).astype(np.float32), labels


def by_loop(bank, queries, k, temperature):
    """The share predicted correctly, one query after another."""
    (features, labels), (asked, truth) = bank, bank if queries is None else queries
    right = 0
    for row, (feature, answer) in enumerate(zip(asked, truth, strict=True)):
        similar = [
            (float(feature @ other / np.linalg.norm(feature) / np.linalg.norm(other)), int(label))
            for index, (other, label) in enumerate(zip(features, labels, strict=True))
            if queries is not None or index != row
        ]
        votes = np.zeros(labels.max() + 1)
        for similarity, label in sorted(similar, reverse=True)[:k]:
            votes[label] += 1 if temperature is None else np.exp(similarity / temperature)
        right += votes.argmax() == answer
    return right / len(asked)


@pytest.mark.parametrize("temperature", [None, 0.07, 1.0])
@pytest.mark.parametrize("k", [1, 7])
@pytest.mark.parametrize("others", [True, False])
def test_against_a_loop(k, temperature, others):
    bank, queries = clouds(60, seed=1), clouds(31, seed=2) if others else None
    accuracy = knn_accuracy(bank, queries, k=k, temperature=temperature)
    assert accuracy == by_loop(bank, queries, k, temperature)
    assert 0.3 < accuracy < 1  # neither chance nor certainty


@pytest.mark.parametrize("k", [1, 5])
def test_against_scikit_learn(k):
    bank, queries = clouds(80, seed=3), clouds(50, seed=4)
    theirs = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(*bank).score(*queries)
    assert knn_accuracy(bank, queries, k=k, temperature=None) == pytest.approx(theirs, abs=1e-12)


def twins(count, seed, classes=10):
    """Clouds in which each image stands three times, in no order: similarities are equal, and so are the classes."""
    features, labels = clouds(count, seed, classes, width=32)
    order = np.random.default_rng(seed).permutation(3 * count)
    return np.repeat(features, 3, axis=0)[order], np.repeat(labels, 3)[order]


@pytest.mark.parametrize(("k", "temperature"), [(200, 0.07), (20, 0.1), (200, 1.0)])
def test_against_lightly(k, temperature):
    """The k-NN of Lightly's benchmarks."""
    torch = pytest.importorskip("torch")
    lightly = importlib.util.find_spec("lightly")
    if lightly is None:
        pytest.skip("lightly is not installed")
    # Its package of benchmarks asks for pytorch_lightning, this file of it does not.
    knn_predict = runpy.run_path(str(Path(lightly.origin).parent / "utils/benchmarking/knn.py"))["knn_predict"]
    bank, (queries, truth) = twins(300, seed=8), clouds(150, seed=9, classes=10, width=32)
    bank_unit, unit = (torch.nn.functional.normalize(torch.from_numpy(x), dim=1) for x in (bank[0], queries))
    theirs = knn_predict(unit, bank_unit.T, torch.from_numpy(bank[1]).long(), 10, k, temperature)[:, 0]
    for sizes in (Sizes(), Sizes(group=64, chunk=128, block=32)):
        ours = knn_predictions(bank, queries, k=k, temperature=temperature, sizes=sizes)
        np.testing.assert_array_equal(ours, theirs)
    assert 0.5 < (ours == truth).mean() < 1


@pytest.mark.parametrize("temperature", [None, 0.07])
def test_equal_images_of_different_classes(temperature):
    """All features are corners of a cube, each many times and in all classes: who votes is decided by the rows."""
    random = np.random.default_rng(0)
    features, queries = (random.choice([-1, 1], (n, 4)).astype(np.float32) for n in (400, 60))
    labels = random.integers(0, 5, 400).astype(np.int32)
    expected = []
    for query in queries:
        similarity = features @ query / 4
        rows = np.argsort(-similarity, kind="stable")[:30]
        weights = np.ones(30) if temperature is None else np.exp(similarity[rows].astype(np.float64) / temperature)
        # Of equal votes the first class; sums of equal weights in another order may differ in the last place.
        votes = np.bincount(labels[rows], weights, minlength=5)
        expected.append(int(np.flatnonzero(votes >= votes.max() * (1 - 1e-12))[0]))
    for sizes in (Sizes(), Sizes(group=7, chunk=13, block=3)):
        found = knn_predictions((features, labels), queries, k=30, temperature=temperature, sizes=sizes)
        np.testing.assert_array_equal(found, expected)


def test_a_low_temperature_leaves_the_nearest():
    """Weights that would all be too small for a number do not make the first class win."""
    found = Neighbours(np.array([[0.3, 0.2, 0.2]], np.float32), np.array([[0, 1, 2]]))
    labels = np.array([2, 1, 1])
    assert vote(found, labels, 3, 1e-5).tolist() == [2]
    assert vote(found, labels, 3, None).tolist() == [1]


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_refused(temperature):
    with refused("temperature", str(temperature)):
        knn_accuracy(clouds(12, seed=1), None, k=2, temperature=temperature)


def test_leaving_one_out_leaves_out_the_image_itself():
    """Pairs of opposite classes: the nearest other image is always wrong, and only the image itself would be right."""
    rng = np.random.default_rng(0)
    features = np.repeat(rng.normal(size=(10, 8)), 2, axis=0).astype(np.float32)
    features[1::2] += 0.01
    labels = np.tile([0, 1], 10).astype(np.int32)
    assert knn_accuracy((features, labels), None, k=1, temperature=None) == 0.0
    assert knn_accuracy((features, labels), (features, labels), k=1, temperature=None) == 1.0


def test_leaving_one_out_in_chunks():
    """Each chunk has its own rows on the diagonal."""
    bank = clouds(50, seed=5)
    whole = knn_accuracy(bank, None, k=3, temperature=0.1)
    assert knn_accuracy(bank, None, k=3, temperature=0.1, sizes=Sizes(chunk=16, group=20, block=8)) == whole


def test_length_does_not_count():
    bank, queries = clouds(40, seed=6), clouds(20, seed=7)
    longer = bank[0] * np.random.default_rng(0).uniform(0.1, 10, (40, 1)).astype(np.float32), bank[1]
    assert knn_accuracy(longer, queries, k=3, temperature=None) == knn_accuracy(bank, queries, k=3, temperature=None)


@pytest.mark.parametrize(("k", "others", "most"), [(0, True, 12), (13, True, 12), (12, False, 11), (-1, False, 11)])
def test_k_out_of_range_is_refused(k, others, most):
    queries = clouds(5, seed=2) if others else None
    with refused("k", f"{k} is not in 1 .. {most}"):
        knn_accuracy(clouds(12, seed=1), queries, k=k, temperature=None)


def test_classes_go_by_name_in_both_splits(tmp_path):
    """Though val lacks one of train's; what has no class, or does not decode, is left out and counted."""
    for split, names in {"train": "abc", "val": "bc"}.items():
        for name in names:
            for i in range(3):
                file = tmp_path / split / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), {"a": 0, "b": 120, "c": 250}[name] + i).save(file)
    config = dataclasses.replace(TINY, workdir=str(tmp_path / "run"), data=f"folder:{tmp_path}")
    state = init_state(config)
    with contextlib.closing(Checkpoints(tmp_path / "run", config)) as checkpoints:
        checkpoints.save(1, state)

    def result():
        return compare_with_untrained(tmp_path / "run", None, k=1, temperature=None, pooling="mean")

    assert result().startswith("1-NN accuracy, 6 images of val among 9: 100.00% at step 1")
    (tmp_path / "val" / "b" / "0.png").write_bytes(b"nothing")
    Image.new("L", (8, 8)).save(tmp_path / "train" / "none.png")
    assert "5 images of val among 9" in result()
    assert f"Left out: 1 do not decode ({tmp_path}/val/b/0.png) and 1 have no class" in result()
    (tmp_path / "val" / "d").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "val" / "d" / "0.png")
    with refused("classes", "val has classes that train has not: d"):
        result()
