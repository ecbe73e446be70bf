"""PyTorch files of every kind are read: what is not in them, what is wrong in them, and what is left out."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import mae_jax
from mae_jax.config import IMAGENET_MEAN, FinetuneConfig
from mae_jax.models.patches import resize_positions
from mae_jax.port.convert import port
from mae_jax.port.infer_config import Hints
from mae_jax.port.keys import to_fair
from mae_jax.port.layouts import LAYOUTS, to_layout, written
from mae_jax.port.read import read_weights
from mae_jax.port.tensors import read_file, write_safetensors, write_torch
from mae_jax.storage.checkpoints import save_params
from tests.refusals import refused

from .conftest import CLASSIFIERS, TINY, draw_params, same

GOLDEN = Path(__file__).parents[1] / "golden" / "fair_tiny" / "checkpoint.pth"

WRAPPINGS = {"ddp": ("module.", "model"), "lightning": ("net.", "state_dict"), "timm training": ("", "state_dict")}


@pytest.mark.parametrize("wrapped", WRAPPINGS)
@pytest.mark.parametrize("index", range(len(LAYOUTS)))
def test_every_spelling_in_every_wrapping(tmp_path, index, wrapped):
    params = draw_params(TINY)
    prefix, key = WRAPPINGS[wrapped]
    there = to_layout(to_fair(params, TINY), LAYOUTS[index])
    state = {prefix + name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in there.items()}
    torch.save({key: state, "epoch": 7}, tmp_path / "f.ckpt")
    weights = read_weights(tmp_path / "f.ckpt", Hints(3, 4))
    assert same(params, weights.params)
    assert "left out: epoch" in weights.notes


def test_tensors_of_other_modules_are_left_out_and_noted(tmp_path):
    there = to_layout(to_fair(draw_params(TINY), TINY), LAYOUTS[1])
    state = {f"model.{name}": torch.from_numpy(np.ascontiguousarray(values)) for name, values in there.items()}
    others = {"ema.decay": 1, "model.online_classifier.weight": 2, "model.backbone.mask_token": 3}
    torch.save({"state_dict": state | {name: torch.zeros(size) for name, size in others.items()}}, tmp_path / "f.ckpt")
    weights = read_weights(tmp_path / "f.ckpt", Hints(3, 4))
    note = next(note for note in weights.notes if "does not use" in note)
    assert all(name.removeprefix("model.") in note for name in others)


def test_a_linear_probe_is_one_product(tmp_path):
    """BatchNorm without affine parameters, in front of the head, is folded into it."""
    generator = torch.Generator().manual_seed(0)
    norm = torch.nn.BatchNorm1d(48, affine=False, eps=1e-6).eval()
    norm.running_mean.normal_(generator=generator)
    norm.running_var.uniform_(0.5, 2, generator=generator)
    head = torch.nn.Sequential(norm, torch.nn.Linear(48, 7))
    params = draw_params(CLASSIFIERS["class"])
    state = {
        key: torch.from_numpy(np.ascontiguousarray(values))
        for key, values in to_fair(params, CLASSIFIERS["class"]).items()
        if not key.startswith("head")
    }
    state |= {f"head.{key}": values for key, values in head.state_dict().items()}
    torch.save({"model": state}, tmp_path / "probe.pth")
    config, params = mae_jax.load_torch(tmp_path / "probe.pth", encoder_heads=3)
    assert config.pooling == "class"
    x = torch.randn(5, 48, generator=generator)
    ours = x.numpy() @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])
    np.testing.assert_allclose(ours, head(x).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", ["head.0.running_var", "head.1.bias"])
def test_a_part_of_a_linear_probe_that_is_missing_is_named(tmp_path, key):
    tensors = to_fair(draw_params(CLASSIFIERS["class"]), CLASSIFIERS["class"])
    head = {"head.1.weight": tensors.pop("head.weight"), "head.1.bias": tensors.pop("head.bias")}
    head |= {"head.0.running_mean": np.zeros(48, np.float32), "head.0.running_var": np.ones(48, np.float32)}
    del head[key]
    write_torch(tmp_path / "probe.pth", tensors | head, None)
    with refused(key, f"probe.pth: {key} missing, beside head.0.running_mean"):
        read_weights(tmp_path / "probe.pth", Hints(3))


@pytest.mark.parametrize(
    ("layout", "key"), [("fair", "blocks.1.attn.qkv.weight"), ("huggingface", "decoder.decoder_pred.bias")]
)
def test_a_weight_of_integers_is_refused(tmp_path, layout, key):
    tensors = to_layout(to_fair(draw_params(TINY), TINY), written(layout))
    write_torch(tmp_path / "f.pth", tensors | {key: tensors[key].astype(np.int64)}, None)
    with refused(key, f"f.pth: {key} is int64, where a weight is floating"):
        read_weights(tmp_path / "f.pth", Hints(3, 4))


@pytest.mark.parametrize("positions", ["sincos2d", "learned"])
def test_another_image_size(tmp_path, positions):
    config = replace(TINY, positions=positions)
    params = draw_params(config)
    file = mae_jax.save_torch(params, config, tmp_path / "f.pth", layout="fair")
    weights = read_weights(file, image_size=(48, 32))
    assert weights.config == replace(config, image_size=(48, 32))
    note = weights.notes[-1]
    if positions == "sincos2d":
        assert "sin-cos positions are recomputed from 4 x 4 to 6 x 4 patches" in note
        assert same(params, weights.params)
    else:
        assert "learned positions are resized (bicubic) from 4 x 4 to 6 x 4 patches" in note
        table = weights.params["decoder"]["pos_embed"]
        expected = resize_positions(params["decoder"]["pos_embed"][0], (4, 4), (6, 4), True)
        np.testing.assert_array_equal(table[0], expected)
    with refused("image_size", "image_size 33 is not a multiple of patch_size 8"):
        read_weights(file, image_size=33)


def test_float64_needs_to_be_switched_on(tmp_path):
    with refused("dtype", "jax_enable_x64"):
        mae_jax.load_torch(GOLDEN, encoder_heads=3, decoder_heads=4, dtype="float64")
    with jax.enable_x64(True):
        config, params = mae_jax.load_torch(GOLDEN, encoder_heads=3, decoder_heads=4, dtype="float64")
    assert config.dtype == "float64"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float64"}


@pytest.mark.parametrize("form", ["pytorch_model.bin", "in parts", "the file in the folder"])
def test_a_hugging_face_folder_in_its_other_forms(tmp_path, form):
    params = draw_params(TINY)
    folder = mae_jax.save_torch(params, TINY, tmp_path / "hf", layout="huggingface")
    whole = folder / "model.safetensors"
    tensors = read_file(whole).tensors
    if form == "pytorch_model.bin":
        write_torch(folder / "pytorch_model.bin", tensors, None)
    elif form == "in parts":
        names = sorted(tensors)
        parts = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
        for name, keys in parts.items():
            write_safetensors(folder / name, {key: tensors[key] for key in keys}, {})
        index = {"weight_map": {key: name for name, keys in parts.items() for key in keys}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if form == "the file in the folder":
        write_safetensors(whole, tensors, {})  # without our metadata in its header
        folder = whole
    else:
        whole.unlink()
    config, again = mae_jax.load_torch(folder)
    assert config == TINY
    assert same(params, again)


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act", "hf/config.json has hidden_act 'gelu_new'; only the exact gelu"),
        (None, "config.json", "config.json is not JSON"),
    ],
)
def test_a_configuration_that_is_not_ours_is_refused(tmp_path, changes, field, words):
    folder = mae_jax.save_torch(draw_params(TINY), TINY, tmp_path / "hf", layout="huggingface")
    held = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text("{" if changes is None else json.dumps(held | changes))
    with refused(field, words):
        mae_jax.load_torch(folder)


def test_a_normalisation_that_divides_by_zero_is_refused(tmp_path):
    folder = mae_jax.save_torch(draw_params(TINY), TINY, tmp_path / "hf", layout="huggingface")
    held = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(held | {"image_std": [0.5, 0, 0.5]}))
    for source in (folder, folder / "model.safetensors"):
        with refused("image_std", "hf/preprocessor_config.json has image_std [0.5, 0, 0.5]"):
            read_weights(source)


def test_another_epsilon_is_noted(tmp_path):
    folder = mae_jax.save_torch(draw_params(TINY), TINY, tmp_path / "hf", layout="huggingface")
    held = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(held | {"layer_norm_eps": 1e-12}))
    assert "config.json has layer_norm_eps 1e-12; here LayerNorms have the authors' 1e-6" in read_weights(folder).notes


def test_none_of_two_models_beside_each_other_is_taken(tmp_path):
    """As a student and its teacher lie in one file."""
    tensors = {key: torch.from_numpy(np.array(v)) for key, v in to_fair(draw_params(TINY), TINY).items()}
    state = {f"{name}.{key}": values for name in ("student", "teacher") for key, values in tensors.items()}
    torch.save(state, tmp_path / "f.pth")
    with refused("source", "two models lie beside each other, under 'student.' and 'teacher.'"):
        read_weights(tmp_path / "f.pth", Hints(3, 4))


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("cls_token", "source"),
        ("pos_embed", "pos_embed"),
        ("patch_embed.proj.weight", "patch_embed.proj.weight"),
        ("blocks.0.mlp.fc1.weight", "source"),
        ("blocks.0.norm1.weight", "source"),
    ],
)
def test_a_key_that_shows_the_shape_is_named_where_it_is_missing(tmp_path, key, field):
    state = {k: torch.from_numpy(np.array(v)) for k, v in to_fair(draw_params(TINY), TINY).items() if k != key}
    torch.save(state, tmp_path / "f.pth")
    with refused(field, f"{key} is missing"):
        read_weights(tmp_path / "f.pth", Hints(3, 4))


def test_what_a_file_has_is_not_overruled(tmp_path):
    file = mae_jax.save_torch(draw_params(TINY), TINY, tmp_path / "f.pth", layout="fair")
    with refused("encoder_heads", "has encoder_heads 3, and 4 is asked for"):
        mae_jax.load_torch(file, encoder_heads=4)


def test_what_a_run_knows_is_not_taken_from_elsewhere(tmp_path):
    run = mae_jax.save_torch(draw_params(TINY), TINY, tmp_path / "run", layout="jax")
    start = "run is a run of this project, which knows its own sizes: leave out --"
    with refused("encoder_heads", f"{start}encoder-heads 3 and --source-image-size 99 (in Python"):
        mae_jax.load_torch(run, encoder_heads=3, source_image_size=99)
    with refused("decoder_heads", f"{start}decoder-heads 7 (in Python decoder_heads)"):
        port(str(run), tmp_path / "f.pth", "fair", hints=Hints(decoder_heads=7))
    assert mae_jax.load_torch(run, mask_ratio=0.5, norm_pix_loss=False)[0].mask_ratio == 0.5


@pytest.mark.parametrize("changes", [{"mask_ratio": 0.5}, {"norm_pix_loss": False}])
def test_a_classifier_hides_nothing(tmp_path, changes):
    config = CLASSIFIERS["mean"]
    save_params(tmp_path / "run", FinetuneConfig(model=config.model, classes=7), draw_params(config))
    assert mae_jax.load_torch(tmp_path / "run")[0] == config
    (name,) = changes
    with refused(name, f"and hides no patches: leave out --{name.replace('_', '-')} "):
        mae_jax.load_torch(tmp_path / "run", **changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_attention_heads", "3"), ("decoder_num_attention_heads", 0), ("mask_ratio", "1"), ("image_size", [3, 2, 2])],
)
def test_values_of_another_type_are_named(tmp_path, name, value):
    folder = mae_jax.save_torch(draw_params(TINY), TINY, tmp_path / "hf", layout="huggingface")
    write_safetensors(folder / "model.safetensors", read_file(folder / "model.safetensors").tensors, {})
    held = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(held | {name: value}))
    (folder / "preprocessor_config.json").write_text('{"image_mean": null}')
    with refused(name, "hf/config.json has"):
        mae_jax.load_torch(folder)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_how_images_were_normalised_goes_along(tmp_path, name):
    """Where it is known; where it is not, the usual is taken and not taken for the file's."""
    layout = {"model.pth": "fair", "model.safetensors": "timm"}[name]
    given = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    mae_jax.save_torch(draw_params(TINY), TINY, tmp_path / name, layout=layout, part="encoder", **given)
    known = read_weights(tmp_path / name, Hints(encoder_heads=TINY.encoder.heads))
    assert (known.mean, known.std, known.normalisation_known) == (given["mean"], given["std"], True)
    mae_jax.save_torch(draw_params(TINY), TINY, tmp_path / f"b{name}", layout=layout, part="encoder")
    unknown = read_weights(tmp_path / f"b{name}", Hints(encoder_heads=TINY.encoder.heads))
    assert (unknown.mean, unknown.normalisation_known) == (IMAGENET_MEAN, False)
