"""After the loss: gradients, and what training makes of them."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from mae_jax.config import OptimConfig
from mae_jax.models import Params, mae
from mae_jax.models import gradients as written
from mae_jax.port.keys import entries, fitted_entries, from_fair, to_fair
from mae_jax.train import build, objective, optimizers
from parity import torch_train
from parity.bounds import Pair, Pairs
from parity.sides import EPOCHS, STEPS, STEPS_PER_EPOCH, Ours, Reference


def operations(ours: Ours, reference: Reference) -> Pairs:
    """Compare each operation whose gradient is written out, and that gradient, with PyTorch's own differentiation.

    Attention is tried on scores beyond the logarithm of the largest number too, where a softmax overflows that does not
    take the largest score from the others.
    """
    generator, dtype = np.random.default_rng(reference.run_config.seed), ours.config.dtype
    heads = [generator.standard_normal((2, 3, 5, 8)) for _ in range(3)]
    tried: dict[str, tuple[Callable, Callable, list[np.ndarray]]] = {
        "affine": (
            lambda x, kernel, bias: written.affine(x, kernel, bias, dtype),
            lambda x, kernel, bias: torch.nn.functional.linear(x, kernel.T, bias),
            [generator.standard_normal(shape) for shape in ((2, 3, 8), (8, 6), (6,))],
        ),
        "gelu": (written.gelu, torch.nn.functional.gelu, [3 * generator.standard_normal((4, 32))]),
        "split heads": (
            lambda fused: jnp.stack(written.split_heads(fused)),
            lambda fused: fused.permute(2, 0, 3, 1, 4),
            [generator.standard_normal((2, 5, 3, 4, 8))],
        ),
    }
    # Each query is near one key and far from all others, so that no score is near another.
    keys = np.broadcast_to(np.eye(5, 8), (2, 3, 5, 8))
    large = [4000 * keys[:, :, ::-1] + heads[0], keys, heads[2]]
    for name, given in {"attention": heads, "attention, large scores": large}.items():
        tried[name] = (
            lambda query, key, value: written.attend(query, key, value, dtype),
            torch.nn.functional.scaled_dot_product_attention,
            given,
        )
    for name, (mine, other, arrays) in tried.items():
        inputs = [values.astype(reference.precision) for values in arrays]
        result, backwards = jax.vjp(mine, *map(jnp.asarray, inputs))
        leaves = [torch.from_numpy(values).requires_grad_() for values in inputs]
        theirs = other(*leaves)
        yield Pair("operations", name, result, theirs, "stage")
        direction = generator.standard_normal(theirs.shape).astype(reference.precision)
        their_gradients = torch.autograd.grad(theirs, leaves, torch.from_numpy(direction))
        for number, values in enumerate(backwards(jnp.asarray(direction))):
            if name.endswith("large scores") and number < 2:
                continue  # one weight of a row is 1, the others are 0, and no score moves them
            yield Pair("operations", f"{name}, gradient of input {number}", values, their_gradients[number], "stage")


def gradients(ours: Ours, reference: Reference) -> Pairs:
    """Compare the gradient of every tensor, from the loss backwards: the first that departs is where it does.

    The fused qkv bias is one tensor. (The key bias alone has gradient zero in exact arithmetic: its noise would be
    compared with noise.)
    """
    computed = ours.gradients()
    names = [entry.key for entry in entries(ours.config)]
    # What has no place in a module comes last in its stack, as it comes first in the order of the data.
    for name in reversed(names):
        yield Pair(f"gradient {module_of(name)}", name, computed[name], reference.gradients[name], "gradient")


def module_of(name: str) -> str:
    """Name the module of a tensor: 'blocks.3.attn.qkv.bias' to 'blocks.3', 'norm.bias' to 'norm'."""
    parts = name.split(".")
    return ".".join(parts[:2]) if "blocks" in parts[0] else parts[0]


def gradients_on_devices(ours: Ours, reference: Reference) -> Pairs:
    """Compare the gradient that the compiled step averages over its devices with that of the whole batch."""
    averaged, metrics, *_ = ours.run
    norm = np.sqrt(sum(np.square(values).sum() for values in reference.gradients.values()))
    clip_norm = ours.run_config.optim.clip_norm
    shortened = 1.0 if clip_norm is None else min(1.0, clip_norm / float(norm))
    for name, theirs in reference.gradients.items():
        yield Pair("gradient averaged over devices", name, averaged[name], theirs * shortened, "gradient")
    yield Pair("gradient averaged over devices", "global norm", metrics[0].grad_norm, norm, "gradient")


def parameter_groups(ours: Ours, reference: Reference) -> Pairs:
    """Compare which parameters are trained, and which of them decay."""
    mask, theirs = optimizers.decay_mask(ours.params), torch_train.parameter_groups(reference.model)
    task = objective.Pretraining(ours.run_config)
    for entry in (*entries(ours.config), *fitted_entries(ours.config)):
        yield Pair("trained", entry.key, task.trained(entry.path), entry.key in theirs, "exact")
    for entry in entries(ours.config):
        yield Pair("parameter groups", entry.key, at(mask, entry.path), theirs[entry.key], "exact")


def learning_rate(ours: Ours, reference: Reference) -> Pairs:
    """Compare the rate of every step: with warm-up and without, then half a cosine or constant; another batch size."""
    config = ours.run_config
    epochs = jnp.arange(STEPS).astype(ours.config.dtype) / STEPS_PER_EPOCH
    curves: dict[str, dict[str, Any]] = {
        "cosine": {},
        "constant": {"schedule": "constant"},
        "cosine, no warm-up": {"warmup_epochs": 0.0, "min_lr": 3e-5},
        "constant, no warm-up": {"schedule": "constant", "warmup_epochs": 0.0},
        "warm-up to the end": {"warmup_epochs": EPOCHS},
    }
    for name, changes in curves.items():
        for batch_size in (config.batch_size, 1024):
            optim = replace(config.optim, **changes)
            theirs = [
                torch_train.learning_rate(
                    step, optim, batch_size=batch_size, steps_per_epoch=STEPS_PER_EPOCH, epochs=EPOCHS
                )
                for step in range(STEPS)
            ]
            rates = optimizers.learning_rate(epochs, optim, batch_size=batch_size, epochs=EPOCHS)
            yield Pair("learning rate", f"{name}, batch {batch_size}", rates, np.array(theirs), "stage")


def update(ours: Ours, reference: Reference) -> Pairs:
    """Compare two AdamW updates with the reference's gradients, at rate 1; after one the betas would not show.

    Then with gradients whose norm is clipped, in the second update alone: it has twice the length.
    """
    first = reference.gradients
    generator = np.random.default_rng(reference.run_config.seed)
    second = {
        name: values * generator.uniform(-2, 2, values.shape).astype(values.dtype) for name, values in first.items()
    }
    trained = {name: part for name, part in ours.params.items() if mae.trained((name,))}
    both = [from_fair(values, ours.config) for values in (first, second)]
    norms = [float(np.sqrt(sum(np.square(v).sum() for v in values.values()))) for values in (first, second)]
    between = sum(norms) / 2
    for stage, clip_norm in (("AdamW update", None), ("clipping", between)):
        optim = replace(ours.run_config.optim, clip_norm=clip_norm)
        updated_params = to_fair(_updated(optimizers.adamw_direction(optim), trained, both), ours.config)
        theirs = torch_train.updated(reference.model, optim, [first, second])
        for name in first:
            yield Pair(stage, name, updated_params[name], theirs[name], "stage")


def _updated(direction: optax.GradientTransformation, params: Params, gradients: list[Params]) -> Params:
    """Return the parameters after one update at rate 1 for each set of gradients."""

    def run(params: Params, gradients: list[Params]) -> Params:
        state = direction.init(params)
        for values in gradients:
            step, state = direction.update(values, state, params)
            params = jax.tree.map(jnp.subtract, params, step)
        return params

    return jax.jit(run)(params, gradients)


def lars_update(ours: Ours, reference: Reference) -> Pairs:
    """Compare three LARS updates of a kernel, a kernel of zeros, and a bias: no decay and no scale for the last."""
    generator = np.random.default_rng(reference.run_config.seed)
    optim = OptimConfig(optimizer="lars", momentum=0.8, trust=0.02, weight_decay=0.03)
    shapes = {"kernel": (6, 4), "zeros": (4, 4), "bias": (4,)}
    values = {name: generator.standard_normal(shape).astype(reference.precision) for name, shape in shapes.items()}
    values["zeros"] *= 0
    gradients = [
        {name: generator.standard_normal(shape).astype(reference.precision) for name, shape in shapes.items()}
        for _ in range(3)
    ]
    module = torch.nn.ParameterDict(
        {name: torch.nn.Parameter(torch.from_numpy(v.copy())) for name, v in values.items()}
    )
    lars = torch_train.Lars(module, optim.momentum, optim.trust, optim.weight_decay)
    for drawn in gradients:
        for name, parameter in module.items():
            parameter.grad = torch.from_numpy(drawn[name].copy())
        lars.step(1.0)
    updated = _updated(optimizers.lars_direction(optim), jax.tree.map(jnp.asarray, values), gradients)
    for name in shapes:
        yield Pair("LARS update", name, updated[name], module[name], "stage")


def training(ours: Ours, reference: Reference) -> Pairs:
    """Compare 20 steps from the same weights, noise and images: every loss, and in float64 the final weights.

    Adam makes a share of a whole step of the rounding in a gradient near zero, which in float32 is more than rounding.
    """
    _, metrics, final, average = ours.run
    rates = np.array([m.learning_rate for m in metrics])
    yield Pair("training run", "learning rates", rates, np.array(reference.rates), "training")
    losses = np.array([m.loss for m in metrics])
    yield Pair("training run", "losses", losses, np.array(reference.run.losses), "training")
    if reference.precision == "float32":
        return
    ends = {"": (final, reference.run.final)} | ({", average": (average, reference.run.average)} if average else {})
    for what, (mine, other) in ends.items():
        for name in reference.gradients:
            ours_final, theirs = (without_key_bias(name, values[name]) for values in (mine, other))
            yield Pair("training run", f"{name}{what}", ours_final, theirs, "training")
    for name in reference.weights.keys() - reference.gradients.keys():
        for what, mine in {"not trained": final, "not averaged": average or final}.items():
            yield Pair("training run", f"{name}, {what}", mine[name], reference.weights[name], "exact")


def accumulation(ours: Ours, reference: Reference) -> Pairs:
    """Compare steps whose batch is cut into parts and over devices, under every engine, with those of whole batches.

    The norm of gradients is clipped, the rate constant. Each device's copy or part of the weights is compared.
    """
    config = replace(
        ours.run_config,
        accumulate=2 if ours.run_config.batch_size % 4 == 0 else 1,
        optim=replace(ours.run_config.optim, clip_norm=0.5, schedule="constant", warmup_epochs=0.0, ema_decay=None),
    )
    count, rate = 3, optimizers.peak_learning_rate(config.optim, config.batch_size)
    noise = torch.from_numpy(reference.noise[:count])
    theirs = torch_train.train(
        copy.deepcopy(reference.model), config.optim, reference.images[:count], noise, [rate] * count
    )
    for name in ("pmap", "jit", "fsdp"):
        engine = build.build_engine(
            replace(config, engine=name, devices=min(2, len(jax.local_devices()))),
            build.Length(count, STEPS_PER_EPOCH, EPOCHS),
        )
        state = engine.put_state(ours.first_state(ours.params)._replace(average=None))
        losses = []
        for step in range(count):
            batch = objective.Batch(ours.bytes[step], ours.positions[step])
            state, metrics = engine.step(state, engine.put_batch(batch))
            losses.append(jax.device_get(metrics.loss))
        stage = f"accumulation, {name}"
        yield Pair(stage, "losses", np.array(losses), np.array(theirs.losses), "training")
        if reference.precision == "float32":
            continue
        whole = from_fair(
            theirs.final | {k: v for k, v in reference.weights.items() if k not in theirs.final}, ours.config
        )
        for entry in entries(ours.config):
            array, expected = (at(tree, entry.path) for tree in (state.params, whole))
            counts = np.ones_like(expected)
            if entry.key.endswith("qkv.bias"):  # see without_key_bias
                np.split(counts, 3)[1][:] = 0
            for shard in array.addressable_shards:
                mine, other = (
                    counts[shard.index] * values for values in (np.asarray(shard.data), expected[shard.index])
                )
                yield Pair(stage, f"{entry.key} on device {shard.device.id}", mine, other, "training")


def at(tree: Params, path: tuple[str, ...]) -> Any:
    """Return the leaf at a path."""
    for name in path:
        tree = tree[name]
    return tree


def without_key_bias(name: str, values: np.ndarray) -> np.ndarray:
    """Leave out the key bias: its gradient is zero in exact arithmetic, and Adam makes whole steps of its noise."""
    if not name.endswith("qkv.bias"):
        return values
    query, _, value = np.split(np.asarray(values), 3)
    return np.concatenate([query, value])


EVERY_GRADIENT = (gradients, parameter_groups)
TRAINING = (
    learning_rate, update, lars_update,
    gradients_on_devices, training, accumulation,
)  # fmt: skip
