"""The PCA target: fitted as scikit-learn fits it, never trained, and what a run makes of it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import PCA

from mae_jax.data.sources.source import open_source
from mae_jax.data.stream import training_batches
from mae_jax.models.mae import MaskedAutoencoder, from_coefficients, principal_coefficients
from mae_jax.models.patches import patchify
from mae_jax.runs import target as pca
from mae_jax.runs.initial import start_from
from mae_jax.runs.pretrain import pretrain
from mae_jax.storage.loading import load_params
from mae_jax.train.objective import normalise_images
from mae_jax.train.step import init_state, loss_and_gradients, make_step


@pytest.fixture
def components(tiny):
    """Makes a configuration whose target is so many components of 4 values."""

    def make(count=3, **changes):
        config = tiny(**changes)
        return dataclasses.replace(
            config, model=dataclasses.replace(config.model, norm_pix_loss=False, pca_components=count)
        )

    return make


@pytest.fixture(scope="module")
def samples():
    """Patches whose directions have variances apart from each other, off the origin, in unequal parts."""
    generator = np.random.default_rng(0)
    mixing = np.linalg.qr(generator.normal(size=(12, 12)))[0] * np.linspace(3, 0.5, 12)
    values = generator.normal(size=(3000, 12)) @ mixing.T + generator.normal(size=12)
    return np.split(values, [7, 1000, 2500])


@pytest.mark.parametrize("count", [1, 5, 12])
def test_the_components_are_scikit_learns(samples, count):
    fitted = pca.principal_components(iter(samples), count)
    reference = PCA(count, svd_solver="full").fit(np.concatenate(samples))
    np.testing.assert_allclose(fitted.mean, reference.mean_, atol=1e-13)
    signs = np.sign((fitted.basis * reference.components_.T).sum(axis=0))
    np.testing.assert_allclose(fitted.basis * signs, reference.components_.T, atol=1e-11)
    np.testing.assert_allclose(fitted.share, reference.explained_variance_ratio_.sum(), rtol=1e-12)
    assert (fitted.basis[np.abs(fitted.basis).argmax(axis=0), range(count)] > 0).all()


def test_coefficients_and_pixels_are_scikit_learns(samples):
    values = np.concatenate(samples)
    fitted, reference = pca.principal_components(iter(samples), 5), PCA(5, svd_solver="full").fit(values)
    signs = np.sign((fitted.basis * reference.components_.T).sum(axis=0))
    with jax.enable_x64(True):
        mean, basis = jnp.asarray(fitted.mean), jnp.asarray(fitted.basis)
        coefficients = principal_coefficients(jnp.asarray(values[None]), mean, basis)
        pixels = np.asarray(from_coefficients(coefficients, mean, basis))
        coefficients = np.asarray(coefficients)
    np.testing.assert_allclose(coefficients[0] * signs, reference.transform(values), atol=1e-10)
    np.testing.assert_allclose(pixels[0], reference.inverse_transform(reference.transform(values)), atol=1e-10)


@pytest.mark.parametrize("crops", ["host", "device"])
def test_the_sample_is_of_the_runs_first_crops(components, monkeypatch, crops):
    """With patches of every crop, 16 and all, they are those of the training stream."""
    monkeypatch.setattr(pca, "CROPS", 40)  # of three batches of 16, the last one not whole
    config = components(crops=crops, workers=0)
    source = open_source("digits", 1)
    found = np.concatenate(list(pca.sampled_patches(config, source)))
    assert found.shape == (40 * 16, 4)
    assert (found == np.concatenate(list(pca.sampled_patches(config, source)))).all()
    if crops == "device":
        return
    with training_batches(source, config, stop_step=3) as batches:
        images = np.concatenate([batch["image"] for batch in batches])[:40]
    patches = patchify(normalise_images(images, config.augment, "float32"), (2, 2))
    found, expected = (np.sort(values.reshape(40, -1), axis=1) for values in (found, np.asarray(patches)))
    np.testing.assert_array_equal(found, expected)


def test_the_sample_does_not_depend_on_the_batch_but_on_the_seed(components, monkeypatch):
    monkeypatch.setattr(pca, "CROPS", 40)
    monkeypatch.setattr(pca, "PATCHES", 3)
    source = open_source("digits", 1)
    first, other, seeded = (
        np.concatenate(list(pca.sampled_patches(components(workers=0, **changes), source)))
        for changes in ({}, {"batch_size": 24}, {"seed": 1})
    )
    np.testing.assert_array_equal(first, other)
    assert first.shape == seeded.shape == (120, 4)
    assert (first != seeded).any()


def test_the_target_has_no_gradient_and_stays(components, batches, begin):
    config = components(ema_decay=0.75, weight_decay=0.5)
    generator = np.random.default_rng(0)
    fitted = {
        "mean": jnp.asarray(generator.normal(size=4), jnp.float32),
        "basis": jnp.asarray(np.linalg.qr(generator.normal(size=(4, 4)))[0][:, :3], jnp.float32),
    }
    state = begin(config)
    unfitted = state.params
    state = state._replace(params=state.params | {"target": fitted}, average=state.average | {"target": fitted})
    images = normalise_images(batches(1)[0].images, config.augment, "float32")
    noise = jnp.asarray(generator.random((16, 16)), jnp.float32)
    loss_of = jax.jit(lambda params: loss_and_gradients(MaskedAutoencoder(config.model), params, images, noise))
    _, gradients = loss_of(state.params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients["target"]))
    assert np.isnan(loss_of(unfitted)[0])  # whoever forgets to fit it gets no number
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradients["decoder"]["pred"]))
    step, start = jax.jit(make_step(config, steps_per_epoch=1.0, epochs=10.0)), state.params
    for batch in batches(3):
        state, metrics = step(state, batch)
    assert np.isfinite(metrics.loss)
    for kept in (state.params, state.average):
        jax.tree.map(np.testing.assert_array_equal, kept["target"], fitted)
        assert (kept["decoder"]["pred"]["kernel"] != start["decoder"]["pred"]["kernel"]).any()


def test_a_run_learns_and_gives_its_basis_on(components, tmp_path, monkeypatch):
    monkeypatch.setattr(pca, "CROPS", 512)
    config = components(
        steps=300, base_lr=0.08, warmup_epochs=0.1, log_every=20, save_every=100, reconstruct_every=300, devices=1,
        workers=0, batch_size=32, workdir=str(tmp_path / "run"),
    )  # fmt: skip
    pretrain(config)
    sample = np.concatenate(list(pca.sampled_patches(config, open_source("digits", 1))))
    fitted = pca.principal_components(iter([sample]), 3)
    found = {step: load_params(tmp_path / "run" / "checkpoints" / str(step))[1]["target"] for step in (100, 300)}
    jax.tree.map(np.testing.assert_array_equal, found[100], found[300])
    np.testing.assert_array_equal(found[300]["basis"], fitted.basis.astype(np.float32))

    # The loss of predicting the mean patch everywhere is the variance of the coefficients.
    ignorant = np.square((sample - fitted.mean) @ fitted.basis).mean()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.mean([row["loss"] for row in rows][-5:]) < 0.8 * ignorant

    # A new run of other crops takes the basis that the decoder speaks; with another target it is a new decoder.
    other = dataclasses.replace(config, seed=1, init=str(tmp_path / "run"))
    messages = []
    state = start_from(other.init, init_state(other), other, messages.append)
    np.testing.assert_array_equal(state.params["target"]["basis"], found[300]["basis"])
    assert "decoder" in messages[-1]
    plain = dataclasses.replace(other, model=dataclasses.replace(other.model, pca_components=None))
    state = start_from(other.init, init_state(plain), plain, messages.append)
    assert state.params.keys() == {"encoder", "decoder"}
    assert "its decoder is another one" in messages[-1]
