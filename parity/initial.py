"""What training begins from: the distribution of every tensor, and positions resized to another grid."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import torch
from jaxtyping import Float
from scipy import stats

from mae_jax.config import FinetuneConfig, ModelConfig, PretrainConfig, TransformerConfig
from mae_jax.models import Params, patches
from mae_jax.port.keys import Config, encoder_config, entries, to_fair
from mae_jax.train import classification, objective
from mae_jax.train import step as steps
from parity import draws
from parity.bounds import Pair, Pairs
from parity.sides import Ours, Reference

# Wide, so that a vector too has values enough to tell one distribution from another.
WIDE = ModelConfig(
    image_size=(16, 24), patch_size=(4, 8), in_channels=3,
    encoder=TransformerConfig(256, 1, 4), decoder=TransformerConfig(192, 1, 4), positions="learned",
)  # fmt: skip
Distribution = Any  # a frozen one of scipy.stats, which has no public type

CLASSES = 16
LEAST = 1e-4  # a p-value: how rarely such values come of that distribution


def distribution(key: str, shape: tuple[int, ...], head_std: float) -> Distribution | float:
    """Return what a tensor of the authors' name is drawn from, or its constant (appendix A.1, and their code).

    Xavier uniform (Glorot and Bengio 2010, equation 16) is of the kernel as it is multiplied: query, key and value as
    one of 3 D outputs, the patch projection as one of P inputs. Its bias is left at PyTorch's default.
    """
    name = key.rpartition(".")[2]
    if key == "patch_embed.proj.bias":
        return stats.uniform(-(shape_of_projection(WIDE) ** -0.5), 2 * shape_of_projection(WIDE) ** -0.5)
    if "norm" in key:
        return 1.0 if name == "weight" else 0.0
    if name == "bias":
        return 0.0
    if key == "head.weight":
        return stats.norm(0, head_std)
    if "token" in key or "pos_embed" in key:
        return stats.norm(0, 0.02)
    outputs, inputs = shape[0], int(np.prod(shape[1:]))
    limit = (6 / (inputs + outputs)) ** 0.5
    return stats.uniform(-limit, 2 * limit)


def shape_of_projection(config: ModelConfig) -> int:
    """Return P, the values of a patch that each output of the projection sums over."""
    return config.patch_hw[0] * config.patch_hw[1] * config.in_channels


def initial_weights(ours: Ours, reference: Reference) -> Pairs:
    """Compare every tensor before the first step with its distribution: constants exactly, the rest by its values."""
    model, seed = replace(WIDE, dtype=reference.precision), reference.run_config.seed
    tokens = replace(model, encoder_mask_tokens=True)
    tuned = FinetuneConfig(model=model, classes=CLASSES, pooling="class", seed=seed, head_std=0.01)
    made: dict[str, tuple[Config, Params]] = {
        "pretraining": (model, objective.Pretraining(PretrainConfig(model=model, seed=seed)).init()),
        "mask tokens in the encoder": (tokens, objective.Pretraining(PretrainConfig(model=tokens, seed=seed)).init()),
        "classifier": (tuned.classifier, classification.Classification(tuned).init()),
    }
    for what, (config, params) in made.items():
        drawn = to_fair(params, config)
        assert encoder_config(config).encoder == WIDE.encoder
        for entry in entries(config):
            values, expected = drawn[entry.key], distribution(entry.key, entry.shape, tuned.head_std)
            name = f"{what}, {entry.key}"
            if isinstance(expected, float):
                yield Pair("initial weights", name, values, np.full(entry.shape, expected), "exact")
                continue
            yield Pair("initial weights", f"{name}: distribution", follows(values, expected), True, "exact")
            different = len(np.unique(values)) > 0.9 * values.size
            yield Pair("initial weights", f"{name}: all drawn", different, True, "exact")
    yield from _seeds(tuned)
    yield from _first_state(tuned)


def _seeds(tuned: FinetuneConfig) -> Pairs:
    """Compare the head with its documented draws, and see that the rest differs from seed to seed."""
    seeds = (tuned.seed, 2**32 - 1)
    drawn = [classification.Classification(replace(tuned, seed=seed)).init() for seed in seeds]
    for seed, params in zip(seeds, drawn, strict=True):
        kernel = draws.normal(draws.device_key(seed, "head"), (WIDE.encoder.width, CLASSES), tuned.model.dtype)
        yield Pair("initial weights", f"head, seed {seed}", params["head"]["kernel"], tuned.head_std * kernel, "normal")
    pretrained = [objective.Pretraining(PretrainConfig(model=tuned.model, seed=seed)).init() for seed in seeds]
    for what, (one, other) in {"pretraining": pretrained, "classifier": drawn}.items():
        kernels = (params["encoder"]["patch_embed"]["kernel"] for params in (one, other))
        same = bool(np.equal(*map(np.asarray, kernels)).any())
        yield Pair("initial weights", f"{what}, other seed, other weights", same, False, "exact")


def _first_state(tuned: FinetuneConfig) -> Pairs:
    """Compare what a state begins with beside its parameters: step, average, BatchNorm's statistics."""
    optim = replace(tuned.optim, ema_decay=0.9)
    probe = replace(tuned, optim=optim, last_blocks=0, batch_norm=True)
    state = steps.init_state(probe)
    yield Pair("initial state", "step", state.step, 0, "exact")
    statistics = state.params["statistics"]
    for name, value in {"mean": 0.0, "variance": 1.0}.items():
        theirs = np.full(WIDE.encoder.width, value)
        yield Pair("initial state", f"BatchNorm, {name}", statistics[name], theirs, "exact")
    pairs = zip(jax.tree.leaves(state.average), jax.tree.leaves_with_path(state.params), strict=True)
    for average, (path, values) in pairs:
        yield Pair("initial state", f"average of {jax.tree_util.keystr(path)}", average, values, "exact")


def follows(values: Float[np.ndarray, "*any"], expected: Distribution) -> bool:
    """Return whether values may well be drawn from a distribution: in shape, deviation and extremes."""
    flat = values.astype(np.float64).ravel()
    deviation = flat.std() / expected.std()
    # The standard error of a standard deviation; a normal's, which is more than a uniform's.
    close = abs(deviation - 1) < 4.5 * (2 * flat.size) ** -0.5
    low, high = expected.support()
    return bool(
        stats.kstest(flat, expected.cdf).pvalue > LEAST
        and close
        and flat.min() >= low - 1e-6
        and flat.max() <= high + 1e-6
    )


def resized_positions(ours: Ours, reference: Reference) -> Pairs:
    """Compare a learned table brought to another grid with PyTorch's bicubic interpolation, as the authors do it."""
    generator = np.random.default_rng(reference.run_config.seed)
    for old, new in (((4, 6), (6, 9)), ((4, 6), (3, 5)), ((7, 7), (12, 5)), ((2, 3), (2, 3))):
        for class_token in (True, False):
            table = generator.standard_normal((old[0] * old[1] + class_token, 8)).astype(reference.precision)
            mine = patches.resize_positions(table, old, new, class_token)
            grid = torch.from_numpy(table[int(class_token) :]).double().T.reshape(1, 8, *old)
            resized = torch.nn.functional.interpolate(grid, size=new, mode="bicubic", align_corners=False)
            theirs = np.concatenate([table[: int(class_token)], resized[0].flatten(1).T.numpy()])
            yield Pair("resized positions", f"{old} to {new}, class token {class_token}", mine, theirs, "stage")


INITIAL = (initial_weights, resized_positions)
