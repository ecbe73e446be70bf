"""The forward pass, in the order data flows: from bytes to the loss.

Each function is one stage of the paper and yields pairs of tensors. Where a stage has weights it is compared twice:
fed with the reference's input, which shows where a difference arises, and inside the whole forward pass.
"""

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch

from mae_jax.config import ModelConfig, TransformerConfig
from mae_jax.models import blocks as layers
from mae_jax.models import mae, masking, patches
from mae_jax.train import objective
from parity import torch_mae
from parity.bounds import Kind, Pair, Pairs
from parity.sides import Ours, Reference

# --- images, patches, positions ---------------------------------------------------------------------------------


def images(ours: Ours, reference: Reference) -> Pairs:
    """Compare bytes made normalised images."""
    config = ours.run_config
    normalised = objective.normalise_images(jnp.asarray(ours.bytes[0]), config.augment, config.model.dtype)
    yield Pair("images", "images", normalised, reference.images[0].movedim(1, -1), "stage")


def patchify(ours: Ours, reference: Reference) -> Pairs:
    """Compare images cut into patches, and laid back."""
    config, dtype = ours.config, reference.precision
    theirs = torch_mae.patchify(reference.images[0], config.patch_hw)
    yield Pair("patchify", "patches", patches.patchify(ours.images, config.patch_hw), theirs, "exact", dtype)
    laid = patches.unpatchify(jnp.asarray(theirs.numpy()), config.grid, config.patch_hw)
    their_laid = torch_mae.unpatchify(theirs, config.grid, config.patch_hw).movedim(1, -1)
    yield Pair("unpatchify", "images", laid, their_laid, "exact", dtype)
    yield Pair("unpatchify", "there and back", laid, ours.images, "exact")


def position_tables(ours: Ours, reference: Reference) -> Pairs:
    """Compare every frozen table, for both widths, with and without class token; learned ones as they are carried.

    Then a long one, on which a frequency that is rounded shows.
    """
    for kind, theirs in {
        "sincos2d": torch_mae.sincos2d(16, (300, 3)),
        "sincos1d": torch_mae.sincos1d(16, 900),
    }.items():
        table = patches.fixed_positions(kind, 16, (300, 3), class_token=False)
        yield Pair(f"positions {kind}", "300 x 3 patches", table, theirs, "table", "float32")
    for kind in ("sincos2d", "sincos1d"):
        for stack in ("encoder", "decoder"):
            for class_token in (True, False):
                width = getattr(ours.config, stack).width
                variant = _variant(ours.config, positions=kind, class_token=class_token)
                if variant is None:
                    continue
                table = patches.fixed_positions(kind, width, variant.grid, class_token)
                theirs = torch_mae.positions(variant, width)[0]
                yield Pair(
                    f"positions {kind}", f"{stack}, class token {class_token}", table, theirs, "table", "float32"
                )
    if ours.config.positions == "learned":
        model = reference.model
        for stack, theirs in {"encoder": model.pos_embed, "decoder": model.decoder_pos_embed}.items():
            yield Pair("positions learned", stack, ours.params[stack]["pos_embed"], theirs, "exact")


def _variant(config: ModelConfig, **changes: Any) -> ModelConfig | None:
    """Return the configuration with these changes, where such a one can be."""
    try:
        return replace(config, **changes)
    except ValueError:
        return None


# --- noise and masks --------------------------------------------------------------------------------------------


def noise(ours: Ours, reference: Reference) -> Pairs:
    """Compare the noise that the compiled step draws: a row for each example, the same whichever device holds it."""
    drawn = ours.drawn_noise()
    parts = len(ours.engine().devices)
    halves = zip(np.split(drawn, parts), np.split(reference.noise[0], parts), strict=True)
    for device, (mine, theirs) in enumerate(halves):
        yield Pair("noise", f"each example's row, on device {device}", mine, theirs, "exact", "float32")
    yield Pair("noise", "different rows", len(np.unique(drawn, axis=0)), len(drawn), "exact")


def masks(ours: Ours, reference: Reference) -> Pairs:
    """Compare visible patches, restoring order and mask, of each kind, at several ratios, also where noise repeats."""
    uniform = reference.noise[0]
    repeated = np.floor(uniform * 8) / 8  # ties have to fall alike
    variants = [("random", ours.config.mask_ratio), *(("random", ratio) for ratio in (0.4, 0.6, 0.7, 0.9))]
    variants += [("block", ours.config.mask_ratio), ("block", 0.6), ("grid", 0.75)]
    for kind, ratio in variants:
        config = _variant(ours.config, masking=kind, mask_ratio=ratio)
        if config is None:
            continue
        for name, values in {"noise": uniform, "repeated noise": repeated}.items():
            made = masking.make_mask(jnp.asarray(values), config)
            order = torch_mae.shuffle(config, torch.from_numpy(values)).numpy()
            kept = torch_mae.visible_count(config)
            restore = np.argsort(order, axis=1)
            stage, what = f"mask {kind}", f"ratio {ratio}, {name}"
            ids_keep = made.ids_shuffle[:, : config.keep]
            yield Pair(stage, f"ids_keep, {what}", ids_keep, order[:, :kept], "exact")
            yield Pair(stage, f"ids_restore, {what}", made.ids_restore, restore, "exact")
            yield Pair(stage, f"mask, {what}", made.hidden, restore >= kept, "exact", "float32")


# --- encoder ----------------------------------------------------------------------------------------------------


def encoder_input(ours: Ours, reference: Reference) -> Pairs:
    """Compare the projection of the visible patches, then with positions and the class token."""
    _, returned = ours.forward
    theirs = reference.stages
    visible = np.take_along_axis(theirs["patch_embed"], theirs["ids_keep"][..., None], axis=1)
    yield Pair("patch embedding", "tokens", returned["encoder/patch_embed.__call__"], visible, "stage")
    embedded = unshuffled(ours.config, returned["encoder.embed"], theirs["ids_restore"])
    yield Pair("encoder input", "tokens", embedded, theirs["encoder.input"], "stage")


def encoder_blocks(ours: Ours, reference: Reference) -> Pairs:
    """Compare every block of the encoder."""
    yield from blocks(ours, reference, "encoder", ours.config.encoder)


def latent(ours: Ours, reference: Reference) -> Pairs:
    """Compare the encoder's output, behind its final LayerNorm."""
    last = jnp.asarray(reference.stages[f"encoder.block_{ours.config.encoder.depth - 1}"])
    norm = layers.LayerNorm(ours.config.dtype).apply({"params": ours.params["encoder"]["norm"]}, last)
    yield Pair("latent", "same input", norm, reference.stages["latent"], "stage")
    yield Pair("latent", "whole pass", ours.forward[0].latent, reference.stages["latent"], "forward")


def blocks(ours: Ours, reference: Reference, stack: Literal["encoder", "decoder"], config: TransformerConfig) -> Pairs:
    """Compare every block of a stack, first fed with the reference's input, then where the pass arrives there."""
    block = jax.jit(lambda params, x: layers.Block(config, ours.config.dtype).apply({"params": params}, x))
    x, ids_restore = reference.stages[f"{stack}.input"], reference.stages["ids_restore"]
    for i in range(config.depth):
        stage, theirs = f"{stack} block {i}", reference.stages[f"{stack}.block_{i}"]
        yield Pair(stage, "same input", block(ours.params[stack][f"block_{i}"], x), theirs, "stage")
        passed = np.asarray(ours.forward[1][f"{stack}/block_{i}.__call__"])
        x = theirs
        if stack == "decoder" and i == config.depth - 1 and ours.config.class_token:
            # Nothing asks for the class token's result: it is not computed.
            passed, theirs = np.take_along_axis(passed, ids_restore[..., None], axis=1), theirs[:, 1:]
        else:
            passed = unshuffled(ours.config, passed, ids_restore)
        yield Pair(stage, "whole pass", passed, theirs, "forward")


def unshuffled(config: ModelConfig, tokens: Any, ids_restore: np.ndarray) -> np.ndarray:
    """Put tokens of all patches in image order, the class token left in front; leave tokens of visible ones.

    `mae_jax` leaves patches in the order of ids_shuffle, where attention gives the same.
    """
    first, values = int(config.class_token), np.asarray(tokens)
    if values.shape[1] - first != config.num_patches:
        return values
    restored = np.take_along_axis(values[:, first:], ids_restore[..., None], axis=1)
    return np.concatenate([values[:, :first], restored], axis=1)


# --- decoder ----------------------------------------------------------------------------------------------------


def decoder_input(ours: Ours, reference: Reference) -> Pairs:
    """Compare the decoder's input: projection, mask tokens and positions, in image order."""
    theirs = reference.stages
    shuffle = np.argsort(theirs["ids_restore"], axis=1)
    mask = masking.Mask(*(jnp.asarray(values) for values in (shuffle, theirs["ids_restore"], theirs["mask"])))
    # Shuffling is unshuffling by the inverse.
    given = jnp.asarray(unshuffled(ours.config, theirs["latent"], shuffle))
    embedded = ours.model.apply({"params": ours.params}, given, mask, method=lambda m, *args: m.decoder.embed(*args))
    passed = ours.forward[1]["decoder.embed"]
    in_image_order = partial(unshuffled, ours.config, ids_restore=theirs["ids_restore"])
    yield Pair("decoder input", "same input", in_image_order(embedded), theirs["decoder.input"], "stage")
    yield Pair("decoder input", "whole pass", in_image_order(passed), theirs["decoder.input"], "forward")


def decoder_blocks(ours: Ours, reference: Reference) -> Pairs:
    """Compare every block of the decoder."""
    yield from blocks(ours, reference, "decoder", ours.config.decoder)


def prediction(ours: Ours, reference: Reference) -> Pairs:
    """Compare the final LayerNorm and the projection to pixels; the class token is gone.

    The projection is a product alone: XLA's of 512 terms on a CPU is 1.1e-6 to 1.3e-6 from exact, PyTorch's 6e-7.
    """
    last = jnp.asarray(reference.stages[f"decoder.block_{ours.config.decoder.depth - 1}"])
    norm = layers.LayerNorm(ours.config.dtype).apply({"params": ours.params["decoder"]["norm"]}, last)
    yield Pair("prediction", "LayerNorm, same input", norm, reference.stages["decoder.norm"], "stage")
    tokens = last[:, int(ours.config.class_token) :]
    pred = ours.model.apply({"params": ours.params}, tokens, method=lambda m, x: m.decoder.pixels(x))
    yield Pair("prediction", "same input", pred, reference.stages["pred"], "product")
    yield Pair("prediction", "whole pass", ours.forward[0].pred, reference.stages["pred"], "forward")


# --- loss -------------------------------------------------------------------------------------------------------


def target(ours: Ours, reference: Reference) -> Pairs:
    """Compare what is to be predicted: plain, normalised, and principal coefficients in the reference's basis."""
    plain = replace(ours.config, norm_pix_loss=False, pca_components=None)
    cut = patches.patchify(ours.images, plain.patch_hw)
    for normalised in (False, True):
        config = replace(plain, norm_pix_loss=normalised)
        made = mae.MaskedAutoencoder(config).apply({}, cut, method="target")
        theirs = torch_mae.prediction_target(config, reference.images[0])
        yield Pair("target", f"normalised {normalised}", made, theirs, "stage")
    config, their_cut = replace(plain, pca_components=min(8, plain.patch_dim)), torch.from_numpy(np.array(cut))
    module = torch_mae.PrincipalComponents(config.patch_dim, config.target_dim)
    module.mean, module.basis = torch_mae.principal_components(their_cut.flatten(0, 1), config.target_dim)
    basis = {name: jnp.asarray(values.numpy()) for name, values in module.named_buffers()}
    made = mae.MaskedAutoencoder(config).apply({"params": {"target": basis}}, cut, method="target")
    yield Pair("target", f"{config.target_dim} principal components", made, module(their_cut), "product")
    kind: Kind = "stage" if ours.config.pca_components is None else "product"
    yield Pair("target", "whole pass", ours.forward[0].target, reference.stages["target"], kind)


def loss(ours: Ours, reference: Reference) -> Pairs:
    """Compare the mean squared error of the hidden patches, or of all, and the masks that it was taken over."""
    yield Pair("loss", "whole pass", ours.forward[0].loss, reference.stages["loss"], "forward")
    yield Pair("loss", "mask", ours.forward[0].mask, reference.stages["mask"], "exact", "float32")
    yield Pair("loss", "ids_restore", ours.forward[0].ids_restore, reference.stages["ids_restore"], "exact")


FORWARD = (
    images, patchify, position_tables, noise, masks,
    encoder_input, encoder_blocks, latent,
    decoder_input, decoder_blocks, prediction,
    target, loss,
)  # fmt: skip
