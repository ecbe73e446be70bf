"""Scores of classifiers against counting by hand, and what is drawn of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from mae_jax.config import FinetuneConfig
from mae_jax.data.evaluation import evaluation_batches
from mae_jax.data.images.decode import BrokenImage
from mae_jax.data.sources.source import open_source
from mae_jax.data.sources.split import Subset
from mae_jax.evaluation import classify
from mae_jax.evaluation.classify import confusion_matrix, draw_confusion, draw_worst, evaluate_classifier
from mae_jax.hosts import Hosts
from mae_jax.models.classifier import Classifier
from mae_jax.train.build import build_engine, run_length
from mae_jax.train.objective import normalise_images
from mae_jax.train.step import init_state
from tests.refusals import refused
from tests.tiny import TINY

CONFIG = FinetuneConfig(
    model=dataclasses.replace(TINY.model, patch_size=4), augment=TINY.augment, batch_size=16, classes=10, head_std=1.0
)


class WithBroken(Subset):
    """The fourth image does not decode."""

    def load(self, index):
        if index == 3:
            raise BrokenImage("digits[3]", "torn")
        return super().load(index)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: init_state(CONFIG))().params


def evaluated(params, source, config=CONFIG, devices=1):
    engine = build_engine(dataclasses.replace(config, devices=devices), run_length(config, len(source)))
    return evaluate_classifier(engine.put_state(params), source, config, engine.put_rows, devices, Hosts())


def test_evaluation_reads_in_as_many_workers_as_training(params, monkeypatch):
    asked, read = [], classify.evaluation_batches
    monkeypatch.setattr(
        classify, "evaluation_batches", lambda *args, **given: asked.append(given) or read(*args, **given)
    )
    source = WithBroken(open_source("digits", 1), range(30))
    found = [evaluated(params, source, dataclasses.replace(CONFIG, workers=workers)) for workers in (None, 1)]
    assert [given["workers"] for given in asked] == [None, 1]
    np.testing.assert_array_equal(found[0].loss, found[1].loss)


@pytest.mark.parametrize("devices", [1, 4])
def test_against_numpy(params, devices):
    """300 images are more than a batch on one device and none too many for four; one of them is broken."""
    source = WithBroken(open_source("digits", 1), range(300))
    found = evaluated(params, source, devices=devices)
    good = [i for i in range(300) if i != 3]
    images = np.stack([np.asarray(source.load(i))[..., None] for i in good])
    labels = np.array([source.label(i) for i in good])
    pixels = normalise_images(images, CONFIG.augment, "float32")
    logits = np.asarray(Classifier(CONFIG.classifier).apply({"params": params}, pixels), np.float64)
    assert found.left_out == 1
    np.testing.assert_array_equal(found.image, good)
    np.testing.assert_array_equal(found.label, labels)
    np.testing.assert_array_equal(found.predicted[0], logits.argmax(1))
    ranks = (-logits).argsort(1, kind="stable").argsort(1)[np.arange(299), labels]
    np.testing.assert_array_equal(found.rank[0], ranks)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(299), labels]
    np.testing.assert_allclose(found.loss[0], losses, rtol=1e-4, atol=1e-5)
    assert found.top(1)[0] == (logits.argmax(1) == labels).mean()
    assert found.top(10)[0] == 1


def test_equal_scores_go_to_the_first_class(params):
    """A head of zeros predicts class 0, and not all of them at once."""
    params = params | {"head": jax.tree.map(jnp.zeros_like, params["head"])}
    source = open_source("digits", 1)
    found = evaluated(params, source)
    labels = np.array([source.label(i) for i in range(len(source))])
    assert found.top(1)[0] == pytest.approx((labels == 0).mean())
    assert found.top(5)[0] == pytest.approx((labels < 5).mean())


def test_scores_that_are_not_finite_predict_nothing(params):
    """No score is above nan; that does not make it the best."""
    ruined = params | {"head": jax.tree.map(lambda x: x * jnp.nan, params["head"])}
    source = Subset(open_source("digits", 1), range(20))
    assert evaluated(ruined, source).top(5)[0] == 0
    both = params | {"head": jax.tree.map(lambda x, y: jnp.stack([x, y]), ruined["head"], params["head"])}
    found = evaluated(both, source, dataclasses.replace(CONFIG, last_blocks=0, sweep=(0.1, 0.2)))
    np.testing.assert_array_equal(found.rank[1], evaluated(params, source).rank[0])
    assert found.top(5)[0] == 0


def test_images_of_which_none_has_a_class(params):
    class Nothing(Subset):
        def label(self, index):
            return -1

    with refused("data", "none of the 20 images"):
        evaluated(params, Nothing(open_source("digits", 1), range(20)))


def test_heads_of_a_sweep(params):
    config = dataclasses.replace(CONFIG, last_blocks=0, sweep=(0.1, 0.2))
    source = Subset(open_source("digits", 1), range(50))
    two = params | {"head": jax.tree.map(lambda x: jnp.stack([jnp.zeros_like(x), x]), params["head"])}
    found = evaluated(two, source, config)
    np.testing.assert_array_equal(found.rank[1], evaluated(params, source).rank[0])
    assert found.rank.shape == (2, 50)


def test_pictures(params):
    source = open_source("digits", 1)
    found = evaluated(params, source)
    matrix = confusion_matrix(found, 0, 10)
    assert matrix.sum() == 1797
    assert np.trace(matrix) == (found.rank[0] == 0).sum()
    np.testing.assert_array_equal(matrix.sum(1), np.bincount(found.label))
    drawn = np.asarray(draw_confusion(matrix, source.class_names, "title"))
    assert drawn.std() > 10
    worst = np.asarray(draw_worst(found, 0, source, CONFIG, count=9))
    first = int(found.image[found.loss[0].argmax()])
    shown = np.asarray(source.load(first)).repeat(12, 0).repeat(12, 1)
    np.testing.assert_array_equal(worst[6 : 6 + 96, 6 : 6 + 96, 0], shown)


def test_the_axes_of_a_confusion_matrix(monkeypatch):
    figures = []
    monkeypatch.setattr(classify, "Figure", lambda **how: figures.append(Figure(**how)) or figures[-1])
    draw_confusion(np.eye(3, dtype=np.int64), ("a", "b", "c"), "title")
    (axes,) = figures[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")


@pytest.mark.parametrize("asked", [None, 0, 3])
def test_images_are_read_by_as_many_workers_as_the_runs(params, monkeypatch, asked):
    def batches(*args, workers, **others):
        assert workers == asked
        return evaluation_batches(*args, workers=0, **others)

    monkeypatch.setattr(classify, "evaluation_batches", batches)
    source = Subset(open_source("digits", 1), range(20))
    assert evaluated(params, source, dataclasses.replace(CONFIG, workers=asked)).left_out == 0
