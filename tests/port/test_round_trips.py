"""JAX to a format and back is exact to the bit; half the bits give the rounded values."""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import mae_jax
from mae_jax.config import MODELS, ModelConfig
from mae_jax.port.convert import port
from mae_jax.port.infer_config import Hints
from mae_jax.port.read import read_weights
from mae_jax.storage.loading import load_params
from tests.refusals import refused

from .conftest import CLASSIFIERS, ODD, TINY, draw_params, same

GOLDEN = Path(__file__).parents[1] / "golden" / "fair_tiny" / "checkpoint.pth"
FORMATS = ("fair", "timm", "huggingface", "lightly", "lightly-deprecated", "jax")


def reread(path, to, config):
    if to == "jax":
        run, params, _ = load_params(path)
        return run.model, params
    size = config.image_size if isinstance(config.image_size, tuple) else None
    return mae_jax.load_torch(
        path,
        encoder_heads=config.encoder.heads,
        decoder_heads=config.decoder.heads,
        source_image_size=size,
        mask_ratio=config.mask_ratio,
        norm_pix_loss=config.norm_pix_loss,
    )


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("config", [TINY, ODD], ids=["tiny", "odd"])
def test_there_and_back(tmp_path, to, config):
    params = draw_params(config)
    written = mae_jax.save_torch(params, config, tmp_path / "there", layout=to)
    found, again = reread(written, to, config)
    kept = {"encoder": params["encoder"]} if to == "timm" else params
    assert same(kept, again)
    assert found == (replace(config, decoder=ModelConfig.decoder) if to == "timm" else config)


@pytest.mark.parametrize("to", ["fair", "huggingface", "jax"])
def test_base_there_and_back(tmp_path, to):
    """A file, a folder and a checkpoint; other spellings of the keys are tried on smaller models."""
    config = replace(MODELS["vit_base_patch16"], norm_pix_loss=True)
    params = draw_params(config)
    found, again = reread(mae_jax.save_torch(params, config, tmp_path / "there", layout=to), to, config)
    assert same({"encoder": params["encoder"]} if to == "timm" else params, again)
    assert found == config
    shutil.rmtree(tmp_path)  # hundreds of megabytes


@pytest.mark.parametrize("to", FORMATS)
def test_an_encoder_there_and_back(tmp_path, to):
    params = draw_params(TINY)
    written = mae_jax.save_torch(params, TINY, tmp_path / "there", layout=to, part="encoder")
    assert same({"encoder": params["encoder"]}, reread(written, to, TINY)[1])


@pytest.mark.parametrize("to", ["fair", "timm"])
@pytest.mark.parametrize("pooling", CLASSIFIERS)
def test_a_classifier_there_and_back(tmp_path, to, pooling):
    config = CLASSIFIERS[pooling]
    params = draw_params(config)
    file = mae_jax.save_torch(params, config, tmp_path / "f.pth", layout=to)
    found, again = mae_jax.load_torch(file, encoder_heads=3)
    assert (found.classes, found.pooling) == (7, pooling)
    assert same(params, again)


@pytest.mark.parametrize("positions", ["learned", "sincos1d"])
def test_timm_takes_any_positions_and_shapes(tmp_path, positions):
    config = replace(TINY, positions=positions, class_token=False, image_size=(32, 48), patch_size=(4, 8))
    params = draw_params(config)
    file = mae_jax.save_torch(params, config, tmp_path / "f.safetensors", layout="timm")
    found, again = reread(file, "timm", config)
    assert same({"encoder": params["encoder"]}, again)
    assert (found.positions, found.class_token, found.grid) == (positions, False, (8, 6))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_smaller_files_hold_the_rounded_values(tmp_path, dtype, suffix):
    params = draw_params(TINY)
    file = mae_jax.save_torch(params, TINY, tmp_path / f"f{suffix}", layout="lightly", dtype=dtype)
    found, again = reread(file, "lightly", TINY)
    rounding = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    assert same(jax.tree.map(lambda values: values.astype(rounding).astype(np.float32), params), again)
    assert found == TINY
    assert file.stat().st_size < 0.7 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("part", ["all", "encoder"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_smaller_files_come_in_with_exact_positions(tmp_path, dtype, part):
    """Their tables are rounded; this project's are not, and what it computes is verified to float32's bound."""
    file = mae_jax.save_torch(draw_params(TINY), TINY, tmp_path / "f.pth", layout="fair", dtype=dtype)
    lines = []
    port(str(file), tmp_path / "run", "jax", part=part, log=lines.append)
    assert [line.split()[-2:] for line in lines if line.startswith(("latent", "pred"))] == [["5.0e-06", "ok"]] * (
        2 if part == "all" else 1
    )
    found, params = reread(tmp_path / "run", "jax", TINY)
    assert found == TINY
    rounded = read_weights(file).params
    assert same(params, rounded if part == "all" else {"encoder": rounded["encoder"]})


def test_the_authors_checkpoint(tmp_path):
    """Read with nothing but its heads given, and written back to the same tensors."""
    config, params = mae_jax.load_torch(GOLDEN, encoder_heads=3, decoder_heads=4)
    assert (config.image_size, config.patch_size, config.positions) == (32, 8, "sincos2d")
    mae_jax.save_torch(params, config, tmp_path / "again.pth", layout="fair")
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = torch.load(GOLDEN, weights_only=True)["model"]
    after = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], values) for key, values in before.items())
    # Nothing has to be given any more.
    assert mae_jax.load_torch(tmp_path / "again.pth")[0] == config


@pytest.mark.parametrize("to", ["fair", "timm"])
def test_the_encoder_of_a_classifier(tmp_path, to):
    """Where it pools by the class token, its encoder is one like any other."""
    config = CLASSIFIERS["class"]
    mae_jax.save_torch(draw_params(config), config, tmp_path / "f.pth", layout="fair")
    lines = []
    port(
        str(tmp_path / "f.pth"),
        tmp_path / "there",
        to,
        part="encoder",
        hints=Hints(encoder_heads=None),
        log=lines.append,
    )
    assert lines[-1].startswith("wrote")
    assert same({"encoder": draw_params(config)["encoder"]}, read_weights(tmp_path / "there", Hints(3)).params)


def test_a_pca_model_goes_to_jax_with_its_basis_and_its_encoder_anywhere(tmp_path):
    config = replace(TINY, pca_components=5, norm_pix_loss=False)
    generator = np.random.default_rng(1)
    basis = {"mean": generator.normal(size=192), "basis": np.linalg.qr(generator.normal(size=(192, 5)))[0]}
    params = draw_params(config) | {"target": {name: np.float32(values) for name, values in basis.items()}}
    run = mae_jax.save_torch(params, config, tmp_path / "run", layout="jax")
    port(str(run), tmp_path / "again", "jax")
    found, again = reread(tmp_path / "again", "jax", config)
    assert found == config
    assert same(params, again)
    with refused("to", "pca_components 5, and its decoder predicts pixels"):
        port(str(run), tmp_path / "hf", "huggingface")
    mae_jax.save_torch(params, config, tmp_path / "hf", layout="huggingface", part="encoder")
    found, again = mae_jax.load_torch(tmp_path / "hf")
    assert same({"encoder": params["encoder"]}, again)
