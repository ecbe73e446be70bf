"""The authors' published PyTorch code, run once on random weights, reproduced by this project and by the reference.

Everything is float64 and agrees to 1e-10 of the largest value. Some golden gradients are stored in float32: they are
compared with ours rounded alike, where a last bit may fall either way.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mae_jax.config import ModelConfig, OptimConfig, TransformerConfig
from mae_jax.models.mae import MaskedAutoencoder
from mae_jax.models.patches import patchify
from mae_jax.port.keys import from_fair, to_fair
from mae_jax.train.optimizers import adamw_direction
from mae_jax.train.step import loss_and_gradients
from parity import torch_mae, torch_train

FOLDER = Path(__file__).parent / "golden" / "fair_tiny"
FLOAT32_BIT = 2.0**-23  # of the largest value: the same number, rounded to either side


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "expected.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """The checkpoint; its one foreign class is admitted by name and no code of the file is run."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(FOLDER / "checkpoint.pth", weights_only=True)
    return {name: values.numpy() for name, values in checkpoint["model"].items()}


@pytest.fixture(autouse=True)
def _float64():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with jax.enable_x64(True):
        yield
    torch.set_num_threads(threads)


def model_config(norm_pix: bool, dtype: str = "float64") -> ModelConfig:
    stored = json.loads((FOLDER / "config.json").read_text())
    return ModelConfig(
        image_size=stored["image_size"],
        patch_size=stored["patch_size"],
        in_channels=stored["in_channels"],
        encoder=TransformerConfig(stored["embed_dim"], stored["depth"], stored["num_heads"]),
        decoder=TransformerConfig(stored["decoder_embed_dim"], stored["decoder_depth"], stored["decoder_num_heads"]),
        mask_ratio=stored["mask_ratio"],
        norm_pix_loss=norm_pix,
        dtype=dtype,
    )


def params_in(weights, config):
    return jax.tree.map(lambda values: jnp.asarray(values, config.dtype), from_fair(weights, config))


def assert_close(ours, expected, bound=1e-10):
    ours = np.asarray(ours)
    if expected.dtype == np.float32:
        ours, bound = ours.astype(np.float32), max(bound, FLOAT32_BIT)
    assert ours.shape == expected.shape
    assert np.abs(ours.astype(np.float64) - expected).max() <= bound * np.abs(expected).max()


def test_patches(golden):
    images = jnp.asarray(golden["imgs"].transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(patchify(images.astype(np.float64), (8, 8)), golden["f64/patchify"])
    np.testing.assert_array_equal(patchify(images, (8, 8)), golden["f32/patchify"])


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize(("prefix", "dtype", "bound"), [("f64", "float64", 1e-10), ("f32", "float32", 5e-6)])
def test_forward(golden, weights, norm_pix, prefix, dtype, bound):
    config = model_config(norm_pix, dtype)
    images = jnp.asarray(golden["imgs"].transpose(0, 2, 3, 1), dtype)
    model, noise = MaskedAutoencoder(config), jnp.asarray(golden["noise"])
    out = jax.jit(lambda params: model.apply({"params": params}, images, noise))(params_in(weights, config))
    np.testing.assert_array_equal(out.mask, golden["mask"])
    np.testing.assert_array_equal(out.ids_restore, golden["ids_restore"])
    expected = {name: golden[f"{prefix}/{name}"] for name in ("latent", "pred", f"norm_pix={norm_pix:d}/loss")}
    for (name, values), ours in zip(expected.items(), (out.latent, out.pred, out.loss), strict=True):
        assert ours.dtype == dtype, name
        assert np.abs(ours - values).max() <= bound * np.abs(values).max(), name


@pytest.mark.parametrize("norm_pix", [False, True])
def test_gradients(golden, weights, norm_pix):
    config = model_config(norm_pix)
    images = jnp.asarray(golden["imgs"].transpose(0, 2, 3, 1), "float64")
    model, noise = MaskedAutoencoder(config), jnp.asarray(golden["noise"])
    compute = jax.jit(lambda params: loss_and_gradients(model, params, images, noise)[1])
    ours = to_fair(compute(params_in(weights, config)), config)

    prefix = f"f64/norm_pix={norm_pix:d}/grad/"
    expected = {name.removeprefix(prefix): values for name, values in golden.items() if name.startswith(prefix)}
    assert expected.keys() == ours.keys() - {"pos_embed", "decoder_pos_embed"}
    for name, values in expected.items():
        assert_close(ours[name], values)


def test_training_run(golden, weights):
    """Eight updates of AdamW at the stored rates."""
    config, optim = model_config(norm_pix=True), OptimConfig()
    images = jnp.asarray(golden["imgs"].transpose(0, 2, 3, 1), "float64")
    model, direction = MaskedAutoencoder(config), adamw_direction(optim)

    @jax.jit
    def step(params, state, noise, rate):
        loss, gradients = loss_and_gradients(model, params, images, noise)
        updates, state = direction.update(gradients, state, params)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), state, loss

    params = params_in(weights, config)
    state, losses = direction.init(params), []
    for noise, rate in zip(golden["train/noise"], golden["train/lr"], strict=True):
        params, state, loss = step(params, state, noise, rate)
        losses.append(loss)
    assert_trained(golden, np.array(losses), to_fair(params, config))


def assert_trained(golden, losses, final):
    assert_close(losses, golden["train/losses"])
    expected = {name.removeprefix("train/final/"): v for name, v in golden.items() if name.startswith("train/final/")}
    assert len(expected) == 4
    for name, values in expected.items():
        assert_close(final[name], values)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_reference(golden, weights, norm_pix):
    """The PyTorch reference of this project is the authors' model, gradients and training included."""
    model = torch_mae.MaskedAutoencoder(model_config(norm_pix)).double()
    frozen = {name: values for name, values in model.state_dict().items() if "pos_embed" in name}
    for name, values in frozen.items():
        np.testing.assert_array_equal(values, weights[name])
    model.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()})

    images, noise = torch.from_numpy(golden["imgs"]).double(), torch.from_numpy(golden["noise"])
    out = model(images, noise)
    np.testing.assert_array_equal(out.mask, golden["mask"])
    np.testing.assert_array_equal(out.ids_restore, golden["ids_restore"])
    assert_close(out.latent.detach(), golden["f64/latent"])
    assert_close(out.pred.detach(), golden["f64/pred"])
    assert_close(out.loss.detach(), golden[f"f64/norm_pix={norm_pix:d}/loss"])
    out.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, golden[f"f64/norm_pix={norm_pix:d}/grad/{name}"])

    if norm_pix:
        noise, rates = torch.from_numpy(golden["train/noise"]), golden["train/lr"].tolist()
        run = torch_train.train(model, OptimConfig(), images.expand(len(rates), *images.shape), noise, rates)
        assert_trained(golden, np.array(run.losses), run.final)


def test_weights_survive_the_way_there_and_back(weights):
    config = model_config(norm_pix=False)
    returned = to_fair(from_fair(weights, config), config)
    assert returned.keys() == weights.keys()
    for name, values in weights.items():
        np.testing.assert_array_equal(returned[name], values, err_msg=name)
