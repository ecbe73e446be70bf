"""The objective of fine-tuning and probing: what is trained, on however many devices, with however many heads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.config import FinetuneConfig, MixConfig, OptimConfig
from mae_jax.train.build import Length, build_engine
from mae_jax.train.classification import Classification, fold_batch_norm, head_logits
from mae_jax.train.objective import Batch
from mae_jax.train.step import init_state, make_step, merge, select

CLASSES = 3


@pytest.fixture
def classify(tiny):
    """Makes a configuration on the tiny encoder, two blocks deep."""
    pretraining = tiny()
    model = dataclasses.replace(
        pretraining.model, encoder=dataclasses.replace(pretraining.model.encoder, depth=2), norm_pix_loss=False
    )
    base = FinetuneConfig(
        model=model,
        augment=pretraining.augment,
        optim=OptimConfig(base_lr=0.16, warmup_epochs=0, beta2=0.999),
        batch_size=16,
        epochs=10,
        classes=CLASSES,
    )
    return lambda **changes: dataclasses.replace(base, **changes)


PROBE = {
    "last_blocks": 0,
    "batch_norm": True,
    "optim": OptimConfig(optimizer="lars", base_lr=3.0, warmup_epochs=0, weight_decay=0.0),
}


@pytest.fixture
def labelled(batches):
    def make(count):
        rng = np.random.default_rng(1)
        return [batch._replace(labels=rng.integers(0, CLASSES, 16).astype(np.int32)) for batch in batches(count)]

    return make


def trained(config, given):
    """The state after these batches, and the losses."""
    step = jax.jit(make_step(config, steps_per_epoch=4.0, epochs=10.0))
    state, losses = jax.jit(lambda: init_state(config))(), []
    for batch in given:
        state, metrics = step(state, Batch(*(None if x is None else jnp.asarray(x) for x in batch)))
        losses.append(float(metrics.loss))
    return state, losses


def paths(tree):
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"encoder/patch_embed", "encoder/cls_token", "encoder/block_0", "encoder/block_1", "fc_norm", "head"}),
        ({"last_blocks": 1}, {"encoder/block_1", "fc_norm", "head"}),
        ({"last_blocks": 1, "pooling": "class"}, {"encoder/block_1", "encoder/norm", "head"}),
        ({"last_blocks": 0}, {"head"}),
        (PROBE, {"head"}),
    ],
)
def test_what_is_trained_moves_and_nothing_else(classify, labelled, changes, expected):
    config = classify(**changes, head_std=0.1)
    before = paths(jax.jit(lambda: init_state(config))().params)
    state, _ = trained(config, labelled(2))
    after = paths(state.params)
    moved = {name for name in before if (np.asarray(before[name]) != np.asarray(after[name])).any()}
    moved = {"/".join(name.split("/")[: 2 if name.startswith("encoder") else 1]) for name in moved}
    assert moved - {"statistics"} == expected
    assert ("statistics" in moved) == config.batch_norm
    optimised = {name.split("/")[0] for name in paths(select(state.params, Classification(config).trained))}
    assert ("encoder" in optimised) == (config.last_blocks != 0)


def test_it_learns(classify, labelled):
    """The same batch again and again: its loss falls to nothing."""
    _, losses = trained(classify(layer_decay=0.75), labelled(1) * 60)
    assert losses[0] == pytest.approx(np.log(CLASSES), abs=0.01)
    assert losses[-1] < 0.1


def test_a_sweep_is_as_many_runs(classify, labelled):
    """Each head learns what a run with its rate alone teaches it; the loss reported is that of the best."""
    rates, given = (0.3, 3.0, 30.0), labelled(4)
    sweep, losses = trained(classify(**PROBE, sweep=rates), given)
    alone = [
        trained(classify(**PROBE | {"optim": dataclasses.replace(PROBE["optim"], base_lr=rate)}), given)
        for rate in rates
    ]
    for number, (state, _) in enumerate(alone):
        for name in ("kernel", "bias"):
            np.testing.assert_allclose(
                sweep.params["head"][name][number], state.params["head"][name], rtol=1e-5, atol=1e-7
            )
    np.testing.assert_allclose(losses, np.min([found for _, found in alone], axis=0), rtol=1e-5)


def test_a_ruined_head_leaves_the_others_alone(classify, labelled):
    """A rate that is far too large stops its own head, and neither the run nor the other heads."""
    given = labelled(4)
    both, losses = trained(classify(**PROBE, sweep=(3.0, 1e28)), given)
    alone, expected = trained(classify(**PROBE), given)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(both.params["head"]["kernel"][0], alone.params["head"]["kernel"], rtol=1e-5, atol=1e-7)
    assert np.isfinite(both.params["head"]["kernel"]).all()
    assert np.abs(both.params["head"]["kernel"][1]).max() > 1e15


def test_a_folded_batch_norm_gives_the_same_logits(classify, labelled):
    state, _ = trained(classify(**PROBE), labelled(3))
    params = state.params
    features = jnp.asarray(np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32))
    moments = params["statistics"]
    normed = (features - moments["mean"]) / jnp.sqrt(moments["variance"] + 1e-6)
    expected = head_logits(params["head"], normed)
    np.testing.assert_allclose(head_logits(fold_batch_norm(params)["head"], features), expected, rtol=1e-4, atol=1e-5)
    assert "statistics" not in fold_batch_norm(params)


@pytest.mark.parametrize("kind", ["whole", "probe"])
@pytest.mark.parametrize("engine", ["pmap", "fsdp"])
def test_devices_do_not_matter(classify, labelled, kind, engine):
    """Mixing, erasing, drop path and BatchNorm over four devices as on one."""
    mixing = MixConfig(smoothing=0.1, mixup=0.8, cutmix=1.0, erase=0.5)
    changes = {"drop_path": 0.3, "layer_decay": 0.75, "mix": mixing} if kind == "whole" else PROBE
    # RMS-like division by near-zero second moments multiplies rounding: a large eps keeps it out of the comparison.
    changes = changes | {"optim": dataclasses.replace(changes.get("optim", classify().optim), eps=1e-3)}
    given = labelled(3)
    one, losses = trained(classify(**changes), given)
    config = classify(**changes, engine=engine, devices=4)
    built = build_engine(config, Length(10, 4.0, 10.0))
    state, found = built.init_state(lambda: init_state(config)), []
    for batch in given:
        state, metrics = built.step(state, built.put_batch(batch))
        found.append(float(metrics.loss))
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    wanted, params = paths(one.params), paths(jax.device_get(state.params))
    for name in wanted:
        np.testing.assert_allclose(params[name], wanted[name], rtol=1e-3, atol=2e-5, err_msg=name)


def test_accumulated_parts_are_the_whole(classify, labelled):
    changes = {"drop_path": 0.3, "mix": MixConfig(smoothing=0.1, mixup=0.8, cutmix=1.0)}
    _, whole = trained(classify(**changes), labelled(3))
    for accumulate in (2, 4):  # neighbours that are mixed stay in one part
        _, parts = trained(classify(**changes, accumulate=accumulate), labelled(3))
        np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_select_and_merge():
    tree = {"a": {"x": 1, "y": 2}, "b": {"z": 3}, "c": 4}
    part = select(tree, lambda path: path in {("a", "x"), ("c",)})
    assert part == {"a": {"x": 1}, "c": 4}
    assert merge(tree, {"a": {"x": 10}, "c": 40}) == {"a": {"x": 10, "y": 2}, "b": {"z": 3}, "c": 40}
    assert select(tree, lambda path: True) == tree
