"""The comparison bites: mistakes that known ports made are planted into mae_jax, one at a time.

Each has to be caught, and at the stage where it belongs: the stage before still agrees. That no earlier one departs
takes the whole chain, minutes of compiling, and is tried where extended tests are asked for.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mae_jax import rng
from mae_jax.config import ModelConfig, TransformerConfig, wide
from mae_jax.models import blocks, gradients, mae, masking, patches
from mae_jax.port.compare import Comparison
from mae_jax.train import classification, mixing, optimizers
from parity import bfloat16, forward, training, transfer
from parity.sides import STEPS_PER_EPOCH, Reference
from parity.stages import STAGES, run

ENCODER, DECODER = TransformerConfig(16, 1, 2), TransformerConfig(12, 1, 3)
MODELS = {
    "paper": ModelConfig((16, 24), 4, 3, ENCODER, DECODER, norm_pix_loss=True),
    "learned": ModelConfig((16, 24), 4, 3, ENCODER, DECODER, positions="learned"),
    "transfer": ModelConfig((8, 12), 4, 3, ENCODER, DECODER),
}

PRETRAINING = [name for name, stage in STAGES.items() if stage not in transfer.TRANSFER]
STAGES_OF = {
    "paper": PRETRAINING,
    "learned": PRETRAINING[: PRETRAINING.index("encoder_blocks")],
    "transfer": [stage.__name__ for stage in transfer.TRANSFER],
}

Patch = pytest.MonkeyPatch


def replace(patch: Patch, original: object, planted: object) -> None:
    """Put `planted` wherever mae_jax has bound `original` to a name."""
    places = [
        (module, name)
        for module_name, module in list(sys.modules.items())
        if module_name.startswith("mae_jax")
        for name, value in vars(module).items()
        if value is original
    ]
    assert places
    for module, name in places:
        patch.setattr(module, name, planted)


# --- 1 to 4: target, GELU, LayerNorm, positions ------------------------------------------------------------------


def biased_variance(patch: Patch) -> None:
    def planted(cut):
        deviation = jnp.sqrt(cut.var(axis=-1, keepdims=True) + mae.TARGET_EPS)
        return (cut - cut.mean(axis=-1, keepdims=True)) / deviation

    replace(patch, mae.normalise_patches, planted)


def tanh_gelu(patch: Patch) -> None:
    replace(patch, gradients.gelu, partial(nn.gelu, approximate=True))


def layer_norm_eps(patch: Patch, eps: float) -> None:
    patch.setattr(blocks, "LAYER_NORM_EPS", eps)


def swapped_halves(patch: Patch) -> None:
    sincos2d = patches.sincos2d
    replace(patch, sincos2d, lambda width, grid: np.roll(sincos2d(width, grid), width // 2, axis=1))


def other_frequencies(patch: Patch) -> None:
    planted = lambda coordinates, count: np.outer(coordinates, 10000.0 ** -np.linspace(0, 1, count))  # noqa: E731
    patch.setattr(patches, "_angles", planted)


# --- 5 and 6: noise and masks ------------------------------------------------------------------------------------


def one_row_for_the_batch(patch: Patch) -> None:
    draw = rng.example_uniforms
    planted = lambda key, places, count: jnp.broadcast_to(draw(key, places, count)[:1], (len(places), count))  # noqa: E731
    patch.setattr(rng, "example_uniforms", planted)


def same_noise_on_every_device(patch: Patch) -> None:
    draw = rng.example_uniforms
    patch.setattr(rng, "example_uniforms", lambda key, places, count: draw(key, jnp.arange(len(places)), count))


def rounded_hidden_count(patch: Patch) -> None:
    patch.setattr(
        ModelConfig, "keep", property(lambda self: self.num_patches - int(self.mask_ratio * self.num_patches))
    )


# --- 7: loss -----------------------------------------------------------------------------------------------------


def loss_of_all_patches(patch: Patch) -> None:
    compute = mae.MaskedAutoencoder.__call__

    def planted(self, images, noise):
        out = compute(self, images, noise)
        return out._replace(loss=mae.patch_errors(out.pred, out.target).mean())

    patch.setattr(mae.MaskedAutoencoder, "__call__", planted)


def uneven_masks(patch: Patch) -> None:
    """What makes a mean of per-example means another number: examples that hide differently many patches.

    Here every example hides as many as any other, so the two means are one; what can go wrong is the masks.
    """
    keep_smallest = masking.keep_smallest

    def planted(scores, keep):
        return keep_smallest(scores, keep)._replace(hidden=(scores > jnp.median(scores)).astype(jnp.float32))

    replace(patch, keep_smallest, planted)


# --- 8 to 11: patches, decoder, attention, class token -----------------------------------------------------------


def channel_first(patch: Patch) -> None:
    patchify = patches.patchify

    def planted(images, patch_hw):
        cut = patchify(images, patch_hw)
        return cut.reshape(*cut.shape[:2], -1, images.shape[-1]).swapaxes(2, 3).reshape(cut.shape)

    replace(patch, patchify, planted)


def positions_before_unshuffling(patch: Patch) -> None:
    with_positions = mae.with_positions

    def planted(tokens, table, mask, first):
        if tokens.shape[1] == mask.ids_shuffle.shape[1]:
            mask = mask._replace(ids_shuffle=jnp.broadcast_to(jnp.arange(tokens.shape[1]), mask.ids_shuffle.shape))
        return with_positions(tokens, table, mask, first)

    replace(patch, with_positions, planted)


def key_query_value(patch: Patch) -> None:
    split = gradients.split_heads

    def planted(fused):
        key, query, value = split(fused)
        return query, key, value

    replace(patch, split, planted)


def heads_split_last(patch: Patch) -> None:
    """Channels cut as (head_dim, heads) where they are (heads, head_dim)."""
    split = gradients.split_heads

    def planted(fused):
        *rows, heads, head_dim = fused.shape
        return split(fused.reshape(*rows, head_dim, heads).swapaxes(-1, -2))

    replace(patch, split, planted)


def class_token_at_the_first_patch(patch: Patch) -> None:
    fixed = patches.fixed_positions

    def planted(kind, width, grid, class_token):
        table = fixed(kind, width, grid, class_token)
        return np.concatenate([table[1:2], table[1:]]) if class_token else table

    replace(patch, fixed, planted)


def no_row_for_the_class_token(patch: Patch) -> None:
    fixed = patches.fixed_positions
    replace(patch, fixed, lambda kind, width, grid, class_token: fixed(kind, width, grid, False))


def class_token_without_its_row(patch: Patch) -> None:
    with_positions = mae.with_positions

    def planted(tokens, table, mask, first):
        return with_positions(tokens, table if first is None else table.at[0].set(0), mask, first)

    replace(patch, with_positions, planted)


# --- 12 to 14: decay, learning rate, devices ---------------------------------------------------------------------


def everything_decays(patch: Patch) -> None:
    replace(patch, optimizers.decay_mask, lambda params: jax.tree.map(lambda p: True, params))


def tokens_do_not_decay(patch: Patch) -> None:
    replace(patch, optimizers.decay_mask, lambda params: jax.tree.map(lambda p: p.ndim == 2, params))


def rate_of_whole_epochs(patch: Patch) -> None:
    rate = optimizers.learning_rate
    replace(patch, rate, lambda epoch, *args, **kwargs: rate(jnp.floor(epoch), *args, **kwargs))


def warm_up_from_step_one(patch: Patch) -> None:
    rate = optimizers.learning_rate
    replace(patch, rate, lambda epoch, *args, **kwargs: rate(epoch + 1 / STEPS_PER_EPOCH, *args, **kwargs))


def summed_gradients(patch: Patch) -> None:
    patch.setattr(jax.lax, "pmean", jax.lax.psum)


# --- 15: bfloat16 where float32 is due, in models that compute in bfloat16 ---------------------------------------


class LowLayerNorm(blocks.LayerNorm):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), wide(self.dtype))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), wide(self.dtype))
        low = x.astype(self.dtype)
        centred = low - low.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + blocks.LAYER_NORM_EPS)).astype(scale.dtype) * scale + bias


def low_layer_norm(patch: Patch) -> None:
    replace(patch, blocks.LayerNorm, LowLayerNorm)


def low_softmax(patch: Patch) -> None:
    def planted(query, key, value, dtype):
        scores = jnp.matmul(query * query.shape[-1] ** -0.5, key.mT).astype(dtype)
        return jnp.matmul(nn.softmax(scores, axis=-1), value)

    replace(patch, gradients.attend, planted)


def low_loss(patch: Patch) -> None:
    compute = mae.MaskedAutoencoder.__call__

    def planted(self, images, noise):
        out = compute(self, images, noise)
        if self.config.dtype != "bfloat16":
            return out
        errors = mae.patch_errors(out.pred.astype("bfloat16"), out.target.astype("bfloat16"))
        return out._replace(loss=errors.mean().astype("float32"))

    patch.setattr(mae.MaskedAutoencoder, "__call__", planted)


# --- 16 to 20: fine-tuning and probing ---------------------------------------------------------------------------


def undivided_drop_path(patch: Patch) -> None:
    drop = blocks.drop_path
    replace(patch, drop, lambda uniforms, rate: (drop(uniforms, rate) > 0).astype(uniforms.dtype))


def share_as_it_was_drawn(patch: Patch) -> None:
    """The box is cut off at an edge, and classes are mixed as if it were not."""
    box, drawn = mixing.cutmix_box, []

    def remember(share, *args):
        drawn.append(share)
        return box(share, *args)

    def planted(images, targets, inside):
        mixed = jnp.where(inside[:, :, None], mixing.neighbours(images), images)
        return mixed, targets * drawn[-1] + mixing.neighbours(targets) * (1 - drawn[-1])

    replace(patch, mixing.cutmix, planted)
    replace(patch, box, remember)


def layer_rates_from_the_head(patch: Patch) -> None:
    """The last block at the full rate."""
    rates = optimizers.layer_rates
    replace(patch, rates, lambda params, depth, decay: rates(params, depth - 1, decay))


def biased_running_variance(patch: Patch) -> None:
    running = classification._running
    replace(patch, running, lambda old, mean, variance, batch_size: running(old, mean, variance, 2**30))


def statistics_of_each_device(patch: Patch) -> None:
    def planted(self, features):
        return features.mean(axis=0), features.var(axis=0)

    patch.setattr(classification.Classification, "_moments", planted)


@dataclass(frozen=True)
class Trap:
    """A mistake and where it has to show.

    at: the function that compares the stage. stage: its name in the results, and `tensor` where that is not enough.
    """

    number: int
    plant: Callable[[Patch], None]
    at: Callable[..., Iterator]
    stage: str
    tensor: str = ""
    model: str = "paper"

    def stages(self) -> list[str]:
        """The stage before, and the one where it has to show."""
        names = STAGES_OF[self.model]
        place = names.index(self.at.__name__)
        return names[max(place - 1, 0) : place + 1]

    def __str__(self) -> str:
        name = self.plant.func.__name__ if isinstance(self.plant, partial) else self.plant.__name__
        value = f" {self.plant.keywords}" if isinstance(self.plant, partial) else ""
        return f"{self.number} {name}{value}"


TRAPS = [
    Trap(1, biased_variance, forward.target, "target"),
    Trap(2, tanh_gelu, forward.encoder_blocks, "encoder block 0"),
    Trap(3, partial(layer_norm_eps, eps=1e-5), forward.encoder_blocks, "encoder block 0"),
    Trap(3, partial(layer_norm_eps, eps=1e-12), forward.encoder_blocks, "encoder block 0"),
    Trap(4, swapped_halves, forward.position_tables, "positions sincos2d"),
    Trap(4, other_frequencies, forward.position_tables, "positions sincos2d"),
    Trap(5, one_row_for_the_batch, forward.noise, "noise"),
    Trap(5, same_noise_on_every_device, forward.noise, "noise"),
    Trap(6, rounded_hidden_count, forward.masks, "mask random"),
    Trap(7, loss_of_all_patches, forward.loss, "loss"),
    Trap(7, uneven_masks, forward.masks, "mask random"),
    Trap(8, channel_first, forward.patchify, "patchify"),
    Trap(9, positions_before_unshuffling, forward.decoder_input, "decoder input"),
    Trap(10, key_query_value, forward.encoder_blocks, "encoder block 0"),
    Trap(10, heads_split_last, forward.encoder_blocks, "encoder block 0"),
    Trap(11, class_token_at_the_first_patch, forward.position_tables, "positions sincos2d"),
    Trap(11, no_row_for_the_class_token, forward.position_tables, "positions sincos2d"),
    Trap(11, class_token_without_its_row, forward.encoder_input, "encoder input", model="learned"),
    Trap(12, everything_decays, training.parameter_groups, "parameter groups"),
    Trap(12, tokens_do_not_decay, training.parameter_groups, "parameter groups", "cls_token"),
    Trap(13, rate_of_whole_epochs, training.learning_rate, "learning rate"),
    Trap(13, warm_up_from_step_one, training.learning_rate, "learning rate"),
    Trap(14, summed_gradients, training.gradients_on_devices, "gradient averaged over devices"),
    Trap(15, low_layer_norm, bfloat16.mixed_precision, "mixed precision", "LayerNorm of 64 + normal"),
    Trap(15, low_softmax, bfloat16.mixed_precision, "mixed precision", "attention of scores of 16, rounded"),
    Trap(15, low_loss, bfloat16.mixed_precision, "mixed precision", "loss of its own prediction"),
    Trap(16, undivided_drop_path, transfer.drop_path, "drop path", model="transfer"),
    Trap(17, share_as_it_was_drawn, transfer.targets, "cutmix", model="transfer"),
    Trap(18, layer_rates_from_the_head, transfer.layer_decay, "layer decay", model="transfer"),
    Trap(19, biased_running_variance, transfer.probing, "linear probing", "BatchNorm: variance", model="transfer"),
    Trap(20, statistics_of_each_device, transfer.probing, "linear probing", "losses", model="transfer"),
]


@pytest.fixture(autouse=True)
def _traced_anew():
    """A block that was traced before stays as it was then, whatever is planted."""
    blocks.block_class.cache_clear()
    yield
    blocks.block_class.cache_clear()


@pytest.fixture(scope="module")
def references() -> dict[str, Reference]:
    """PyTorch's side, which no trap touches."""
    return {name: Reference(config, "float64") for name, config in MODELS.items()}


def first_departure(reference: Reference, stages: Sequence[str]) -> Comparison | None:
    return next((result for stage in run([reference], stages) for result in stage if not result.passed), None)


def assert_caught(departure: Comparison | None, trap: Trap) -> None:
    assert departure is not None, "the comparison did not notice"
    assert departure.stage == trap.stage
    assert trap.tensor in ("", departure.tensor)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_departs_without_a_trap(references, name):
    assert len(jax.local_devices()) > 1, "some traps show on two devices only"
    tried = {stage for trap in TRAPS if trap.model == name for stage in trap.stages()}
    assert first_departure(references[name], [stage for stage in STAGES if stage in tried]) is None


@pytest.mark.parametrize("trap", TRAPS, ids=str)
def test_trap_is_caught_where_it_belongs(references, monkeypatch, trap):
    trap.plant(monkeypatch)
    assert_caught(first_departure(references[trap.model], trap.stages()), trap)


@pytest.mark.extended
@pytest.mark.parametrize("trap", TRAPS, ids=str)
def test_no_stage_before_departs(references, monkeypatch, trap):
    trap.plant(monkeypatch)
    assert_caught(first_departure(references[trap.model], STAGES_OF[trap.model]), trap)


def test_every_trap_is_planted():
    assert {trap.number for trap in TRAPS} == set(range(1, 21))
