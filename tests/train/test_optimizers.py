"""The learning-rate curve at points worked out by hand, and AdamW against its formula in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_jax.config import OptimConfig
from mae_jax.train.optimizers import (
    adamw_direction,
    decay_mask,
    direction,
    kernel_mask,
    layer_rates,
    learning_rate,
    peak_learning_rate,
)

CURVE = OptimConfig(base_lr=1.0, min_lr=0.25, warmup_epochs=4)


def rates(epochs_at, optim=CURVE, batch_size=256, epochs=12.0):
    found = learning_rate(jnp.asarray(epochs_at, jnp.float32), optim, batch_size=batch_size, epochs=epochs)
    return np.asarray(found)


def test_the_curve_by_hand():
    """Warm-up over 4 epochs, then half a cosine from 1 to 1/4 over 8: halfway down at epoch 8."""
    expected = {0: 0.0, 1: 0.25, 3: 0.75, 4: 1.0, 6: 0.25 + 0.375 * (1 + math.sqrt(0.5)), 8: 0.625, 12: 0.25}
    np.testing.assert_allclose(rates(list(expected)), list(expected.values()), rtol=1e-6, atol=0)


def test_the_first_rate_is_zero_and_the_last_nearly_the_smallest():
    steps = np.arange(1200) / 100
    curve = rates(steps)
    assert curve[0] == 0
    assert curve.argmax() == 400
    assert 0.25 < curve[-1] < 0.25 + 1e-5
    assert (np.diff(curve[:401]) > 0).all()
    assert (np.diff(curve[400:]) < 0).all()


def test_a_constant_schedule_warms_up_and_stays():
    optim = OptimConfig(base_lr=1.0, warmup_epochs=4, schedule="constant")
    np.testing.assert_allclose(rates([0, 1, 4, 5, 100], optim), [0, 0.25, 1, 1, 1], rtol=1e-6)


def test_no_warm_up_starts_at_the_peak():
    for schedule in ("cosine", "constant"):
        optim = OptimConfig(base_lr=1.0, warmup_epochs=0, schedule=schedule)
        assert rates(1e-3, optim) == pytest.approx(1.0, rel=1e-6)
    assert rates(0.0, OptimConfig(base_lr=1.0, warmup_epochs=0)) == 1.0


@given(batch_size=st.integers(1, 2**16), base_lr=st.floats(1e-6, 1.0))
def test_the_peak_grows_linearly_with_the_batch(batch_size, base_lr):
    optim = OptimConfig(base_lr=base_lr, warmup_epochs=4)
    assert peak_learning_rate(optim, batch_size) == pytest.approx(base_lr * batch_size / 256, rel=1e-12)


def test_the_peak_is_that_of_the_global_batch():
    assert rates(4, CURVE, batch_size=1024) == pytest.approx(4.0)
    # min_lr is as it is, whatever the batch.
    assert rates(12, CURVE, batch_size=1024) == pytest.approx(0.25)


PARAMS = {
    "cls_token": np.full((1, 1, 4), 0.5),
    "pos_embed": np.full((1, 3, 4), 0.25),
    "norm": {"scale": np.ones(4), "bias": np.full(4, 0.5)},
    "fc1": {"kernel": np.full((4, 2), -0.5), "bias": np.full(2, 0.5)},
}


def test_what_decays():
    assert decay_mask(PARAMS) == {
        "cls_token": True,
        "pos_embed": True,
        "norm": {"scale": False, "bias": False},
        "fc1": {"kernel": True, "bias": False},
    }


def adamw_by_hand(params, gradients, optim):
    """The direction of each update in turn (Loshchilov and Hutter 2019, algorithm 2), of parameters that stay."""
    mean, square, directions = 0.0, 0.0, []
    for count, gradient in enumerate(gradients, 1):
        mean = optim.beta1 * mean + (1 - optim.beta1) * gradient
        square = optim.beta2 * square + (1 - optim.beta2) * gradient**2
        unbiased = mean / (1 - optim.beta1**count), square / (1 - optim.beta2**count)
        decay = optim.weight_decay * params if params.ndim > 1 else 0.0
        directions.append(unbiased[0] / (np.sqrt(unbiased[1]) + optim.eps) + decay)
    return directions


def directions(optim, gradients):
    """What optax gives for each of the gradients in turn, in float64."""
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, PARAMS)
        transformation = adamw_direction(optim)
        state, found = transformation.init(params), []
        update = jax.jit(transformation.update)
        for gradient in gradients:
            direction, state = update(jax.tree.map(jnp.asarray, gradient), state, params)
            found.append(jax.tree.map(np.asarray, direction))
    return found


def drawn_gradients(count, scale=1.0):
    rng = np.random.default_rng(0)
    return [jax.tree.map(lambda p: scale * rng.normal(size=p.shape), PARAMS) for _ in range(count)]


@pytest.mark.parametrize("scale", [1.0, 1e-8])  # at 1e-8 the place of eps decides
def test_adamw_by_hand(scale):
    optim = OptimConfig(weight_decay=0.1)
    gradients = drawn_gradients(4, scale)
    found = directions(optim, gradients)
    for path, params in jax.tree.leaves_with_path(PARAMS):

        def at(tree, path=path):
            for key in path:
                tree = tree[key.key]
            return tree

        for ours, expected in zip(map(at, found), adamw_by_hand(params, map(at, gradients), optim), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_clipping_scales_large_gradients_alone():
    """Clipped to norm 1, a gradient of norm n is the gradient divided by n; a short one stays."""
    gradients = drawn_gradients(2)
    norms = [math.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(g))) for g in gradients]
    gradients[1] = jax.tree.map(lambda leaf: leaf / norms[1] / 2, gradients[1])
    assert norms[0] > 2
    divided = [jax.tree.map(lambda leaf: leaf / norms[0], gradients[0]), gradients[1]]
    clipped = directions(OptimConfig(clip_norm=1.0), gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), clipped, directions(OptimConfig(), divided))
    plain = directions(OptimConfig(), gradients)
    assert not np.allclose(clipped[1]["cls_token"], plain[1]["cls_token"], rtol=1e-3)


def lars_by_hand(params, gradients, optim):
    """The direction of each update in turn (You et al. 2017, algorithm 1), of parameters that stay."""
    velocity, found = 0.0, []
    for gradient in gradients:
        if params.ndim > 1:
            gradient = gradient + optim.weight_decay * params
            gradient = gradient * optim.trust * np.linalg.norm(params) / np.linalg.norm(gradient)
        velocity = optim.momentum * velocity + gradient
        found.append(velocity)
    return found


def test_lars():
    optim = OptimConfig(optimizer="lars", weight_decay=0.1, momentum=0.8, trust=0.02)
    params = {"kernel": np.full((4, 2), -0.5), "bias": np.full(2, 0.5)}
    rng = np.random.default_rng(0)
    gradients = [{name: rng.normal(size=p.shape) for name, p in params.items()} for _ in range(3)]
    with jax.enable_x64(True):
        transformation = direction(optim)
        placed = jax.tree.map(jnp.asarray, params)
        state = transformation.init(placed)
        for number, gradient in enumerate(gradients):
            update, state = transformation.update(jax.tree.map(jnp.asarray, gradient), state, placed)
            for name, p in params.items():
                wanted = lars_by_hand(p, [g[name] for g in gradients], optim)[number]
                np.testing.assert_allclose(update[name], wanted, rtol=1e-12)


def test_lars_leaves_what_has_no_length():
    """A kernel of zeros, and a gradient of zeros, give no division by zero: the gradient is taken as it is."""
    transformation = direction(OptimConfig(optimizer="lars", weight_decay=0.0))
    for p, g in ((jnp.zeros((2, 2)), jnp.ones((2, 2))), (jnp.ones((2, 2)), jnp.zeros((2, 2)))):
        update, _ = transformation.update({"k": g}, transformation.init({"k": p}), {"k": p})
        np.testing.assert_array_equal(update["k"], g)


def test_layer_rates_and_what_decays_in_fine_tuning():
    """Of a depth of 2: the head 1, the last block the decay, ... the patch projection its cube."""
    leaf = np.ones((2, 2))
    params = {
        "encoder": {
            "patch_embed": {"kernel": leaf, "bias": leaf[0]},
            "cls_token": leaf[None],
            "pos_embed": leaf[None],
            "block_0": {"kernel": leaf},
            "block_1": {"kernel": leaf},
            "norm": {"scale": leaf[0]},
        },
        "head": {"kernel": leaf},
    }
    rates = layer_rates(params, 2, 0.5)
    assert rates["head"]["kernel"] == rates["encoder"]["norm"]["scale"] == 1
    assert rates["encoder"]["block_1"]["kernel"] == 0.5
    assert rates["encoder"]["block_0"]["kernel"] == 0.25
    assert rates["encoder"]["patch_embed"] == {"kernel": 0.125, "bias": 0.125}
    assert rates["encoder"]["cls_token"] == rates["encoder"]["pos_embed"] == 0.125
    decays = kernel_mask(params)
    assert decays["encoder"]["patch_embed"] == {"kernel": True, "bias": False}
    assert not decays["encoder"]["cls_token"]
    assert not decays["encoder"]["pos_embed"]
    assert decays["head"]["kernel"]
