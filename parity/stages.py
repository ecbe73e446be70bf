"""What is compared, in the order data flows: from bytes to a trained model.

Each function is one stage of the paper and yields pairs of tensors. Where a stage has weights it is compared twice:
fed with the reference's input, which tells where a difference arises, and inside the whole forward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

from mae_jax.config import ModelConfig, TransformerConfig
from mae_jax.models import layers, mae, masking, patches, positions
from mae_jax.port.keys import Params, entries, from_fair, to_fair
from mae_jax.train import optimizers, steps
from parity import torch_mae, torch_train
from parity.cases import EPOCHS, STEPS, STEPS_PER_EPOCH, Ours, Reference, draw_weights
from parity.compare import Pair, Result, compare

Pairs = Iterator[Pair]


# --- images, patches, positions ----------------------------------------------------------------------------------


def images(ours: Ours, reference: Reference) -> Pairs:
    """Bytes to normalised images."""
    theirs = reference.images[0].movedim(1, -1)
    yield Pair("images", "images", ours.images, theirs, "stage")


def patchify(ours: Ours, reference: Reference) -> Pairs:
    """Images to patches, and back."""
    config, theirs = ours.config, reference.images[0]
    inputs = jnp.asarray(theirs.movedim(1, -1).numpy())
    cut, their_cut = patches.patchify(inputs, config.patch_hw), torch_mae.patchify(theirs, config.patch_hw)
    yield Pair("patchify", "patches", cut, their_cut, "exact")
    laid = patches.unpatchify(jnp.asarray(their_cut.numpy()), config.grid, config.patch_hw)
    yield Pair("unpatchify", "images", laid, inputs, "exact")
    their_laid = torch_mae.unpatchify(their_cut, config.grid, config.patch_hw)
    yield Pair("unpatchify", "images, reference", laid, their_laid.movedim(1, -1), "exact")


def position_tables(ours: Ours, reference: Reference) -> Pairs:
    """The frozen tables of every kind, for both widths, with and without class token; the learned one as carried."""
    for kind in ("sincos2d", "sincos1d"):
        for stack in ("encoder", "decoder"):
            for class_token in (True, False):
                width = getattr(ours.config, stack).width
                variant = _variant(ours.config, positions=kind, class_token=class_token)
                if variant is None:
                    continue
                table = positions.fixed_positions(kind, width, variant.grid, class_token)
                theirs = torch_mae.positions(variant, width)[0]
                yield Pair(f"positions {kind}", f"{stack}, class token {class_token}", table, theirs, "float32")
    if ours.config.positions == "learned":
        model = reference.model
        for stack, theirs in {"encoder": model.pos_embed, "decoder": model.decoder_pos_embed}.items():
            yield Pair("positions learned", stack, ours.params[stack]["pos_embed"], theirs, "exact")


def _variant(config: ModelConfig, **changes: Any) -> ModelConfig | None:
    """The configuration with these changes, where such a one can be."""
    try:
        return replace(config, **changes)
    except ValueError:
        return None


# --- noise and masks ---------------------------------------------------------------------------------------------


def noise(ours: Ours, reference: Reference) -> Pairs:
    """The noise that the compiled step draws: a row for each example, the same whichever device holds it."""
    drawn = drawn_noise(ours)
    yield Pair("noise", "each example's row, drawn alone", drawn, reference.noise[0], "exact")
    yield Pair("noise", "different rows", len(np.unique(drawn, axis=0)), len(drawn), "exact")


def drawn_noise(ours: Ours) -> np.ndarray:
    """The noise (B, L) that reaches the model inside the step on several devices, by position in the batch.

    The model is not run: it hands its inputs to the host. An example is known by its image, all of one grey level.
    """
    mean, std = ours.run_config.augment.mean[0], ours.run_config.augment.std[0]
    drawn: dict[int, np.ndarray] = {}

    def keep(pixels: np.ndarray, rows: np.ndarray) -> None:
        drawn.update(zip(np.rint((pixels * std + mean) * 255).astype(int).tolist(), rows, strict=True))

    def spy(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if type(context.module) is not mae.MaskedAutoencoder or context.method_name != "__call__":
            return call(*args, **kwargs)
        jax.debug.callback(keep, args[0][:, 0, 0, 0], args[1])
        return mae.Output(*[jnp.zeros((), args[0].dtype)] * len(mae.Output._fields))

    greys = np.broadcast_to(np.arange(len(ours.bytes[0]), dtype=np.uint8)[:, None, None, None], ours.bytes[0].shape)
    engine = ours.engine()
    state = engine.place(ours.first_state({"none": jnp.zeros(())}))
    with nn.intercept_methods(spy):
        jax.block_until_ready(
            engine.step(state, engine.put(steps.Batch(jnp.asarray(greys), jnp.asarray(ours.positions[0]))))
        )
    jax.effects_barrier()
    return np.stack([drawn[example] for example in range(len(greys))])


def masks(ours: Ours, reference: Reference) -> Pairs:
    """Visible patches, restoring order and mask, of each kind and at several ratios, also where noise repeats."""
    uniform = reference.noise[0]
    # Blocks are drawn with probability 0 from repeated values; for the others ties must fall alike.
    repeated = np.floor(uniform * 8) / 8
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
            what = f"ratio {ratio}, {name}"
            yield Pair(
                f"mask {kind}", f"ids_keep, {what}", made.ids_shuffle[:, : config.keep], order[:, :kept], "exact"
            )
            yield Pair(f"mask {kind}", f"ids_restore, {what}", made.ids_restore, restore, "exact")
            yield Pair(f"mask {kind}", f"mask, {what}", made.hidden, restore >= kept, "exact")


# --- encoder -----------------------------------------------------------------------------------------------------


def encoder_input(ours: Ours, reference: Reference) -> Pairs:
    """Patch projection of the visible patches; then positions and the class token."""
    _, returned = ours.forward
    theirs = reference.stages
    visible = np.take_along_axis(theirs["patch_embed"], theirs["ids_keep"][..., None], axis=1)
    yield Pair("patch embedding", "tokens", returned["encoder/patch_embed.__call__"], visible, "stage")
    embedded = unshuffled(ours.config, returned["encoder.embed"], theirs["ids_restore"])
    yield Pair("encoder input", "tokens", embedded, theirs["encoder.input"], "stage")


def encoder_blocks(ours: Ours, reference: Reference) -> Pairs:
    """Every block of the encoder."""
    yield from blocks(ours, reference, "encoder", ours.config.encoder)


def latent(ours: Ours, reference: Reference) -> Pairs:
    """The encoder's final LayerNorm."""
    last = reference.stages[f"encoder.block_{ours.config.encoder.depth - 1}"]
    norm = layers.LayerNorm(ours.config.dtype).apply({"params": ours.params["encoder"]["norm"]}, last)
    yield Pair("latent", "same input", norm, reference.stages["latent"], "stage")
    yield Pair("latent", "whole pass", ours.forward[0].latent, reference.stages["latent"], "forward")


def blocks(ours: Ours, reference: Reference, stack: Literal["encoder", "decoder"], config: TransformerConfig) -> Pairs:
    """Every block of a stack, first fed with the reference's input, then where the pass arrives there."""
    block = jax.jit(lambda params, x: layers.Block(config, ours.config.dtype).apply({"params": params}, x))
    x = reference.stages[f"{stack}.input"]
    for i in range(config.depth):
        theirs = reference.stages[f"{stack}.block_{i}"]
        yield Pair(f"{stack} block {i}", "same input", block(ours.params[stack][f"block_{i}"], x), theirs, "stage")
        arrived = unshuffled(
            ours.config, ours.forward[1][f"{stack}/block_{i}.__call__"], reference.stages["ids_restore"]
        )
        yield Pair(f"{stack} block {i}", "whole pass", arrived, theirs, "forward")
        x = theirs


def unshuffled(config: ModelConfig, tokens: Any, ids_restore: np.ndarray) -> np.ndarray:
    """Tokens of all patches in image order, the class token left in front; tokens of visible ones as they are.

    `mae_jax` leaves patches in the order of ids_shuffle, where attention gives the same.
    """
    first, values = int(config.class_token), np.asarray(tokens)
    if values.shape[1] - first != config.num_patches:
        return values
    restored = np.take_along_axis(values[:, first:], ids_restore[..., None], axis=1)
    return np.concatenate([values[:, :first], restored], axis=1)


# --- decoder -----------------------------------------------------------------------------------------------------


def decoder_input(ours: Ours, reference: Reference) -> Pairs:
    """Projection, mask tokens and positions, in image order."""
    theirs = reference.stages
    shuffle = np.argsort(theirs["ids_restore"], axis=1)
    mask = masking.Mask(*(jnp.asarray(values) for values in (shuffle, theirs["ids_restore"], theirs["mask"])))
    # Shuffling is unshuffling by the inverse.
    given = unshuffled(ours.config, theirs["latent"], shuffle)
    embedded = ours.model.apply({"params": ours.params}, given, mask, method=lambda m, *args: m.decoder.embed(*args))
    passed = ours.forward[1]["decoder.embed"]
    in_image_order = partial(unshuffled, ours.config, ids_restore=theirs["ids_restore"])
    yield Pair("decoder input", "same input", in_image_order(embedded), theirs["decoder.input"], "stage")
    yield Pair("decoder input", "whole pass", in_image_order(passed), theirs["decoder.input"], "forward")


def decoder_blocks(ours: Ours, reference: Reference) -> Pairs:
    """Every block of the decoder."""
    yield from blocks(ours, reference, "decoder", ours.config.decoder)


def prediction(ours: Ours, reference: Reference) -> Pairs:
    """Final LayerNorm and the projection to pixels; the class token is gone."""
    last = reference.stages[f"decoder.block_{ours.config.decoder.depth - 1}"][:, int(ours.config.class_token) :]
    pred = ours.model.apply({"params": ours.params}, last, method=lambda m, x: m.decoder.predict(x))
    yield Pair("prediction", "same input", pred, reference.stages["pred"], "stage")
    yield Pair("prediction", "whole pass", ours.forward[0].pred, reference.stages["pred"], "forward")


# --- loss --------------------------------------------------------------------------------------------------------


def target(ours: Ours, reference: Reference) -> Pairs:
    """What is to be predicted, plain and normalised."""
    for normalised in (False, True):
        config = replace(ours.config, norm_pix_loss=normalised)
        cut = patches.patchify(ours.images, config.patch_hw)
        made = mae.MaskedAutoencoder(config).apply({}, cut, method="target")
        theirs = torch_mae.prediction_target(config, reference.images[0])
        yield Pair("target", f"normalised {normalised}", made, theirs, "stage")
    yield Pair("target", "whole pass", ours.forward[0].target, reference.stages["target"], "stage")


def loss(ours: Ours, reference: Reference) -> Pairs:
    """Mean squared error of the hidden patches, or of all."""
    yield Pair("loss", "whole pass", ours.forward[0].loss, reference.stages["loss"], "forward")
    yield Pair("loss", "mask", ours.forward[0].mask, reference.stages["mask"], "exact")
    yield Pair("loss", "ids_restore", ours.forward[0].ids_restore, reference.stages["ids_restore"], "exact")


def mixed_precision(ours: Ours, reference: Reference) -> Pairs:
    """A bfloat16 model keeps LayerNorm, softmax and loss in float32: inputs are such that bfloat16 would be far off."""
    generator = np.random.default_rng(reference.run_config.seed)

    x = 64 + generator.standard_normal((2, 8, 32)).astype(np.float32)
    norm = layers.LayerNorm("bfloat16").apply({"params": {"scale": np.ones(32), "bias": np.zeros(32)}}, x)
    theirs = torch.nn.functional.layer_norm(torch.from_numpy(x), (32,), eps=torch_mae.EPS)
    yield Pair("mixed precision", "LayerNorm of 64 + normal", norm, theirs, "bfloat16")

    # A head of 16: the scale 1/4 rounds nothing. Scores reach some tens, where bfloat16 knows them to 1/8.
    query, key, value = (torch.from_numpy(generator.normal(0, scale, (1, 2, 64, 16))).bfloat16() for scale in (4, 4, 1))
    q, k, v = (jnp.asarray(heads.float().numpy(), "bfloat16") for heads in (query, key, value))
    mixed = layers.attend(q, k, v, "bfloat16")
    theirs = torch.softmax(query.double() @ key.double().mT / 4, dim=-1) @ value.double()
    yield Pair("mixed precision", "softmax of large scores", mixed, theirs, "bfloat16")

    tiny = TransformerConfig(width=16, depth=1, heads=1)
    config = ModelConfig(8, 2, 1, tiny, tiny, loss_on="all", dtype="bfloat16")
    weights = draw_weights(torch_mae.MaskedAutoencoder(config), generator)
    params = jax.tree.map(np.float32, from_fair(weights, config))
    pixels, uniform = generator.standard_normal((2, 8, 8, 1)), generator.random((2, 16))
    out = jax.jit(mae.MaskedAutoencoder(config).apply)({"params": params}, np.float32(pixels), np.float32(uniform))
    their_loss = np.square(np.asarray(out.pred, np.float64) - np.asarray(out.target, np.float64)).mean()
    yield Pair("mixed precision", "loss of its own prediction", out.loss, their_loss, "float32")


# --- gradients and updates ---------------------------------------------------------------------------------------


def gradients(ours: Ours, reference: Reference) -> Pairs:
    """The gradient of every tensor, in the order of the data; the fused qkv bias is one tensor.

    (The key bias alone has gradient zero in exact arithmetic: its noise would be compared with noise.)
    """
    for name in (entry.key for entry in entries(ours.config)):
        yield Pair(f"gradient {module_of(name)}", name, ours.gradients[name], reference.gradients[name], "gradient")


def module_of(name: str) -> str:
    """'blocks.3.attn.qkv.bias' to 'blocks.3', 'norm.bias' to 'norm'."""
    parts = name.split(".")
    return ".".join(parts[:2]) if "blocks" in parts[0] else parts[0]


def gradients_on_devices(ours: Ours, reference: Reference) -> Pairs:
    """The gradient that the compiled step averages over its devices is that of the whole batch."""
    averaged, metrics, _ = ours.run
    for name, theirs in reference.gradients.items():
        yield Pair("gradient averaged over devices", name, averaged[name], theirs, "gradient")
    norm = np.sqrt(sum(np.square(values).sum() for values in reference.gradients.values()))
    yield Pair("gradient averaged over devices", "global norm", metrics[0].grad_norm, norm, "gradient")


def parameter_groups(ours: Ours, reference: Reference) -> Pairs:
    """Which parameters decay."""
    mask = optimizers.decay_mask(ours.params)
    theirs = torch_train.parameter_groups(reference.model)
    for entry in entries(ours.config):
        decays = mask
        for name in entry.path:
            decays = decays[name]
        yield Pair("parameter groups", entry.key, decays, theirs[entry.key], "exact")


def learning_rate(ours: Ours, reference: Reference) -> Pairs:
    """The rate of every step: warm-up, then half a cosine."""
    config = ours.run_config
    epochs = jnp.arange(STEPS).astype(ours.config.dtype) / STEPS_PER_EPOCH
    rate = partial(optimizers.learning_rate, optim=config.optim, batch_size=config.batch_size, epochs=EPOCHS)
    yield Pair("learning rate", "curve", jax.jit(rate)(epochs), np.array(reference.rates), "stage")


def update(ours: Ours, reference: Reference) -> Pairs:
    """Two AdamW updates with the reference's gradients, at rate 1; after one the betas would not show."""
    optim = ours.run_config.optim
    first = reference.gradients
    generator = np.random.default_rng(reference.run_config.seed)
    second = {
        name: values * generator.uniform(-2, 2, values.shape).astype(values.dtype) for name, values in first.items()
    }

    direction = optimizers.adamw_direction(optim)

    def updated(params: Params, gradients: list[Params]) -> Params:
        state = direction.init(params)
        for values in gradients:
            step, state = direction.update(values, state, params)
            params = jax.tree.map(jnp.subtract, params, step)
        return params

    both = [from_fair(values, ours.config) for values in (first, second)]
    updated_params = to_fair(jax.jit(updated)(ours.params, both), ours.config)
    theirs = torch_train.updated(reference.model, optim, [first, second])
    for name in first:
        yield Pair("AdamW update", name, updated_params[name], theirs[name], "stage")


def training(ours: Ours, reference: Reference) -> Pairs:
    """20 steps from the same weights, noise and images."""
    _, metrics, final = ours.run
    rates = np.array([m.learning_rate for m in metrics])
    yield Pair("training run", "learning rates", rates, np.array(reference.rates), "training")
    losses = np.array([m.loss for m in metrics])
    yield Pair("training run", "losses", losses, np.array(reference.run.losses), "training")
    for name in reference.gradients:
        ours_final, theirs = (_without_key_bias(name, values[name]) for values in (final, reference.run.final))
        yield Pair("training run", name, ours_final, theirs, "training")


def _without_key_bias(name: str, values: np.ndarray) -> np.ndarray:
    """The key bias's gradient is zero in exact arithmetic; Adam makes whole steps of its noise. So it is left out."""
    if not name.endswith("qkv.bias"):
        return values
    query, _, value = np.split(values, 3)
    return np.concatenate([query, value])


STAGES: dict[str, Callable[[Ours, Reference], Pairs]] = {
    stage.__name__: stage
    for stage in (
        images, patchify, position_tables, noise, masks,
        encoder_input, encoder_blocks, latent,
        decoder_input, decoder_blocks, prediction,
        target, loss, mixed_precision,
        gradients, parameter_groups, learning_rate, update, gradients_on_devices, training,
    )
}  # fmt: skip


def run(reference: Reference, stages: Sequence[str] = ()) -> Iterator[list[Result]]:
    """The results of these stages, or of all, one after another.

    Each precision runs as its users run it: float64 with 64-bit values enabled, float32 without.
    """
    ours = None
    for name, stage in STAGES.items():
        if stages and name not in stages:
            continue
        with jax.enable_x64(reference.precision == "float64"), jax.default_matmul_precision("highest"):
            ours = ours or Ours(reference)
            results = [compare(pair, reference.precision) for pair in stage(ours, reference)]
        yield results
