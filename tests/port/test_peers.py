"""The libraries themselves receive our files, and hand us theirs."""

import json
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

import mae_jax
from mae_jax.config import MODELS
from mae_jax.models.classifier import Classifier
from mae_jax.port.convert import port
from mae_jax.port.infer_config import Hints
from mae_jax.port.keys import to_fair
from mae_jax.port.layouts import to_layout, written
from mae_jax.port.read import read_weights
from mae_jax.port.receivers.lightly import lightly
from mae_jax.port.receivers.timm import timm_name, timm_vit
from mae_jax.port.verify import outputs
from parity import peers
from parity.models import SQUARE
from parity.sides import Reference

from .conftest import CLASSIFIERS, ODD, TINY, draw_params
from .test_round_trips import same

SQUARE_MODELS = {"tiny_square": SQUARE["tiny_square"], "odd": ODD}


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("peer", peers.PEERS)
@pytest.mark.parametrize("model", SQUARE_MODELS)
def test_forward_loss_and_gradients(peer, model, precision):
    results = [result for stage in peers.run(peer, Reference(SQUARE_MODELS[model], precision)) for result in stage]
    assert [result for result in results if not result.passed] == []
    assert {"gradient patch_embed", "gradient blocks.1", "latent"} <= {result.stage for result in results}


def test_a_mistake_in_a_spelling_shows(monkeypatch):
    """Queries and keys exchanged on the way."""
    monkeypatch.setattr(peers, "to_layout", lambda tensors, layout: {
        (name.replace("q_proj", "?").replace("k_proj", "q_proj").replace("?", "k_proj")): values
        for name, values in to_layout(tensors, layout).items()
    })  # fmt: skip
    first = next(iter(peers.run("huggingface", Reference(SQUARE["tiny_square"], "float64"))))
    # The attention of each layer is transposed, which its output shows.
    assert not first[0].passed


@pytest.mark.parametrize("part", ["all", "encoder"])
def test_hugging_face_takes_every_key(tmp_path, part):
    from transformers import ViTMAEForPreTraining, ViTMAEModel

    mae_jax.save_torch(draw_params(TINY), TINY, tmp_path / "hf", layout="huggingface", part=part)
    written_config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (written_config["layer_norm_eps"], written_config["norm_pix_loss"]) == (1e-6, True)
    model, info = ViTMAEModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(key.startswith("decoder.") for key in info["unexpected_keys"])
    assert bool(info["unexpected_keys"]) == (part == "all")
    assert model.config.layer_norm_eps == 1e-6
    if part == "all":
        _, info = ViTMAEForPreTraining.from_pretrained(tmp_path / "hf", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]


def test_hugging_face_processes_images_as_we_do(tmp_path):
    from transformers import AutoImageProcessor, pipeline

    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    params = draw_params(TINY)
    mae_jax.save_torch(params, TINY, tmp_path / "hf", layout="huggingface", part="encoder", mean=mean, std=std)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    pixels = processor(picture, return_tensors="np")["pixel_values"]
    ours = (np.asarray(picture) / 255 - mean) / std
    np.testing.assert_allclose(pixels[0], ours.transpose(2, 0, 1), atol=1e-5)
    extract = pipeline("image-feature-extraction", model=str(tmp_path / "hf"))
    extract.model.config.mask_ratio = 0.0  # it would hide three patches of four
    found = np.asarray(extract(picture))
    latent = outputs(params, TINY, "encoder", ours[None].astype(np.float32), np.zeros((1, 16), np.float32))["latent"]
    # It shuffles the patches; the class token stays first.
    np.testing.assert_allclose(found[0, 0], latent[0, 0], rtol=1e-4, atol=1e-4)


def test_a_model_of_hugging_face_is_read(tmp_path):
    """As `save_pretrained` of this version writes it, and computes the same here."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(0)
    config = ViTMAEConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192, image_size=32, patch_size=8,
        decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
        decoder_intermediate_size=128, layer_norm_eps=1e-6, norm_pix_loss=True, mask_ratio=0.5,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config).eval()
    with torch.no_grad():
        model.decoder.decoder_pos_embed.normal_()  # which they leave zero
    model.save_pretrained(tmp_path / "hf")
    weights = read_weights(tmp_path / "hf")
    ours = weights.config
    assert (ours.encoder.heads, ours.decoder.heads, ours.mask_ratio, ours.norm_pix_loss) == (3, 4, 0.5, True)
    assert ours.positions == "learned"
    generator = np.random.default_rng(0)
    images, noise = generator.random((2, 32, 32, 3), np.float32), generator.random((2, 16), np.float32)
    found = outputs(weights.params, ours, "all", images, noise)
    with torch.no_grad():
        theirs = model(torch.from_numpy(images).movedim(-1, 1), noise=torch.from_numpy(noise))
    np.testing.assert_allclose(found["pred"], theirs.logits.numpy(), atol=1e-5)
    np.testing.assert_allclose(found["loss"], theirs.loss.numpy(), rtol=1e-5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("size", ["vit_base_patch16", "vit_large_patch16", "vit_huge_patch14"])
def test_timm_takes_its_names_strictly(tmp_path, size, suffix):
    """Widths and patches of each name, two blocks deep."""
    import timm

    whole = MODELS[size]
    name = timm_name(whole)
    assert name in timm.list_models(pretrained=True)
    config = replace(whole, encoder=replace(whole.encoder, depth=2))
    params = draw_params(config, "encoder")
    file = mae_jax.save_torch(params, config, tmp_path / f"f{suffix}", layout="timm")
    model = timm.create_model(name, checkpoint_path=str(file), depth=2).eval()
    images = np.random.default_rng(0).standard_normal((1, 224, 224, 3), np.float32)
    latent = outputs(params, config, "encoder", images, np.zeros((1, config.num_patches), np.float32))["latent"]
    with torch.no_grad():
        theirs = model.forward_features(torch.from_numpy(images).movedim(-1, 1).contiguous())
        pooled = model.forward_head(theirs).numpy()
    assert np.abs(latent - theirs.numpy()).max() < 5e-6 * np.abs(theirs.numpy()).max()
    assert np.abs(latent[:, 0] - pooled).max() < 5e-6 * np.abs(pooled).max()
    file.unlink()


@pytest.mark.parametrize("pooling", CLASSIFIERS)
def test_timm_gives_a_classifiers_logits(tmp_path, pooling):
    import timm

    config = CLASSIFIERS[pooling]
    params = draw_params(config)
    file = mae_jax.save_torch(params, config, tmp_path / "f.safetensors", layout="timm")
    pool = {"mean": {"global_pool": "avg", "fc_norm": True}, "class": {"global_pool": "token"}}[pooling]
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=7, **pool
    ).eval()
    timm.models.load_checkpoint(model, str(file), strict=True)
    images = np.random.default_rng(0).standard_normal((3, 32, 32, 3), np.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(images).movedim(-1, 1)).numpy()
    ours = outputs(params, config, "all", images, np.zeros((3, 16), np.float32))["logits"]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_lightlys_own_mask_and_patches(tmp_path):
    """Its mask counts the class token and keeps it; fed to our model as noise, it hides the same patches."""
    from lightly.models import utils

    torch.manual_seed(0)
    keep, hide = utils.random_token_mask((2, 17), mask_ratio=0.75)
    assert keep.shape == (2, 1 + 4)
    assert (keep[:, 0] == 0).all()
    order = np.concatenate([keep[:, 1:], hide], axis=1) - 1
    noise = order.argsort(axis=1).astype(np.float32)
    config, params = replace(TINY, norm_pix_loss=False), draw_params(TINY)
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    found = outputs(params, config, "all", images, noise)
    mae_jax.save_torch(params, config, tmp_path / "f.pth", layout="lightly")
    module = lightly(config, "all", False, tmp_path / "f.pth").module
    pixels = torch.from_numpy(images).movedim(-1, 1)
    with torch.no_grad():
        latent = module.backbone.encode(pixels, idx_keep=keep)
        tokens = utils.set_at_index(latent.new_zeros(2, 17, 32), keep, module.decoder_embed(latent))
        pred = module.prediction_head(utils.get_at_index(module.decoder(tokens, idx_mask=hide), hide))
        target = utils.get_at_index(utils.patchify(pixels, 8), hide - 1)
        loss = torch.nn.functional.mse_loss(pred, target)
    np.testing.assert_allclose(found["latent"], latent.numpy(), atol=2e-5)
    np.testing.assert_allclose(found["loss"], loss.numpy(), rtol=1e-5)


def test_lightlys_default_vit_with_a_head_is_read(tmp_path):
    """Its examples keep timm's head, which nothing trains."""
    import timm
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.nn.Module()
        vit = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
        module.backbone = MaskedVisionTransformerTIMM(vit)
        module.decoder = MAEDecoderTIMM(
            num_patches=16, patch_size=8, embed_dim=48, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=4
        )
    torch.save({"state_dict": module.state_dict()}, tmp_path / "f.ckpt")
    weights = read_weights(tmp_path / "f.ckpt", Hints(3, 4))
    assert weights.origin == "lightly-deprecated"
    assert weights.config.positions == "sincos2d"
    np.testing.assert_array_equal(
        weights.params["decoder"]["pred"]["kernel"].T, module.decoder.decoder_pred.weight.detach()
    )


@pytest.mark.parametrize("to", ["huggingface", "timm", "lightly", "lightly-deprecated"])
def test_a_port_is_verified_by_the_library(tmp_path, to):
    lines = []
    mae_jax.save_torch(draw_params(ODD), ODD, tmp_path / "f.pth", layout="fair")
    port(str(tmp_path / "f.pth"), tmp_path / "there", to, log=lines.append)
    library = {"huggingface": "transformers"}.get(to, to.split("-")[0])
    assert any(line.startswith(f"verified against {library} ") for line in lines)
    assert lines[-1] == f"wrote {tmp_path / 'there'}"
    again = read_weights(tmp_path / "there", Hints(5, 2))
    kept = draw_params(ODD) if to != "timm" else {"encoder": draw_params(ODD)["encoder"]}
    assert same(kept, again.params)


def test_the_written_names_are_those_of_transformers_4():
    assert written("huggingface").rename("decoder_blocks.0.attn.qkv.bias") == tuple(
        f"decoder.decoder_layers.0.attention.attention.{name}.bias" for name in ("query", "key", "value")
    )


@pytest.mark.parametrize("pooling", CLASSIFIERS)
def test_classifiers_are_timms(pooling):
    """Logits and every gradient of a fine-tuned ViT, `global_pool` "avg" and "token", in float64."""
    config = replace(CLASSIFIERS[pooling], model=replace(TINY, dtype="float64"))
    generator = np.random.default_rng(0)
    images, targets = generator.standard_normal((3, 32, 32, 3)), generator.dirichlet(np.ones(7), 3)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        params = jax.tree.map(jnp.asarray, draw_params(config, dtype=np.float64))

        def loss(params):
            logits = Classifier(config).apply({"params": params}, jnp.asarray(images))
            return optax.softmax_cross_entropy(logits, jnp.asarray(targets)).mean(), logits

        (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        found = to_layout(to_fair(gradients, config), written("timm"))
        weights = to_layout(to_fair(params, config), written("timm"))
    module = timm_vit(config).double()
    module.load_state_dict({name: torch.from_numpy(np.array(values)) for name, values in weights.items()}, strict=True)
    theirs = module(torch.from_numpy(images).movedim(-1, 1))
    torch.nn.functional.cross_entropy(theirs, torch.from_numpy(targets)).backward()
    np.testing.assert_allclose(logits, theirs.detach(), rtol=0, atol=1e-13 * theirs.abs().max().item())
    compared = {name: p.grad.numpy() for name, p in module.named_parameters() if name != "pos_embed"}
    assert compared.keys() == found.keys() - {"pos_embed"}
    for name, expected in compared.items():
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-12 * np.abs(expected).max(), err_msg=name)
