"""After the loss: gradients, and what training makes of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.models import Params, mae
from mae_jax.port.keys import entries, from_fair, to_fair
from mae_jax.train import optimizers
from parity import torch_train
from parity.bounds import Pair, Pairs
from parity.sides import EPOCHS, STEPS, STEPS_PER_EPOCH, Ours, Reference


def gradients(ours: Ours, reference: Reference) -> Pairs:
    """Compare the gradient of every tensor, in the order of the data; the fused qkv bias is one tensor.

    (The key bias alone has gradient zero in exact arithmetic: its noise would be compared with noise.)
    """
    computed = ours.gradients()
    for name in (entry.key for entry in entries(ours.config)):
        yield Pair(f"gradient {module_of(name)}", name, computed[name], reference.gradients[name], "gradient")


def module_of(name: str) -> str:
    """Name the module of a tensor: 'blocks.3.attn.qkv.bias' to 'blocks.3', 'norm.bias' to 'norm'."""
    parts = name.split(".")
    return ".".join(parts[:2]) if "blocks" in parts[0] else parts[0]


def gradients_on_devices(ours: Ours, reference: Reference) -> Pairs:
    """Compare the gradient that the compiled step averages over its devices with that of the whole batch."""
    averaged, metrics, _ = ours.run
    for name, theirs in reference.gradients.items():
        yield Pair("gradient averaged over devices", name, averaged[name], theirs, "gradient")
    norm = np.sqrt(sum(np.square(values).sum() for values in reference.gradients.values()))
    yield Pair("gradient averaged over devices", "global norm", metrics[0].grad_norm, norm, "gradient")


def parameter_groups(ours: Ours, reference: Reference) -> Pairs:
    """Compare which parameters decay."""
    mask = optimizers.decay_mask(ours.params)
    theirs = torch_train.parameter_groups(reference.model)
    for entry in entries(ours.config):
        decays = mask
        for name in entry.path:
            decays = decays[name]
        yield Pair("parameter groups", entry.key, decays, theirs[entry.key], "exact")


def learning_rate(ours: Ours, reference: Reference) -> Pairs:
    """Compare the rate of every step: warm-up, then half a cosine."""
    config = ours.run_config
    epochs = jnp.arange(STEPS).astype(ours.config.dtype) / STEPS_PER_EPOCH
    rate = partial(optimizers.learning_rate, optim=config.optim, batch_size=config.batch_size, epochs=EPOCHS)
    yield Pair("learning rate", "curve", jax.jit(rate)(epochs), np.array(reference.rates), "stage")


def update(ours: Ours, reference: Reference) -> Pairs:
    """Compare two AdamW updates with the reference's gradients, at rate 1; after one the betas would not show."""
    optim = ours.run_config.optim
    first = reference.gradients
    generator = np.random.default_rng(reference.run_config.seed)
    second = {
        name: values * generator.uniform(-2, 2, values.shape).astype(values.dtype) for name, values in first.items()
    }

    direction = optimizers.adamw_direction(optim)
    trained = {name: part for name, part in ours.params.items() if mae.trained((name,))}

    def updated(params: Params, gradients: list[Params]) -> Params:
        state = direction.init(params)
        for values in gradients:
            step, state = direction.update(values, state, params)
            params = jax.tree.map(jnp.subtract, params, step)
        return params

    both = [from_fair(values, ours.config) for values in (first, second)]
    updated_params = to_fair(jax.jit(updated)(trained, both), ours.config)
    theirs = torch_train.updated(reference.model, optim, [first, second])
    for name in first:
        yield Pair("AdamW update", name, updated_params[name], theirs[name], "stage")


def training(ours: Ours, reference: Reference) -> Pairs:
    """Compare 20 steps from the same weights, noise and images: every loss, and in float64 the final weights.

    Adam makes a share of a whole step of the rounding in a gradient near zero, which in float32 is more than rounding.
    """
    _, metrics, final = ours.run
    rates = np.array([m.learning_rate for m in metrics])
    yield Pair("training run", "learning rates", rates, np.array(reference.rates), "training")
    losses = np.array([m.loss for m in metrics])
    yield Pair("training run", "losses", losses, np.array(reference.run.losses), "training")
    if reference.precision == "float32":
        return
    for name in reference.gradients:
        ours_final, theirs = (without_key_bias(name, values[name]) for values in (final, reference.run.final))
        yield Pair("training run", name, ours_final, theirs, "training")
    for name in reference.weights.keys() - reference.gradients.keys():
        yield Pair("training run", f"{name}, not trained", final[name], reference.weights[name], "exact")


def without_key_bias(name: str, values: np.ndarray) -> np.ndarray:
    """Leave out the key bias: its gradient is zero in exact arithmetic, and Adam makes whole steps of its noise."""
    if not name.endswith("qkv.bias"):
        return values
    query, _, value = np.split(np.asarray(values), 3)
    return np.concatenate([query, value])


TRAINING = (gradients, parameter_groups, learning_rate, update, gradients_on_devices, training)
