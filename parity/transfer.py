"""What comes after pretraining: classifier, augmentation of batches, fine-tuning and linear probing."""

import math
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from mae_jax.config import ClassifierConfig, FinetuneConfig, MixConfig, OptimConfig, Pooling, TransformerConfig
from mae_jax.models import Params
from mae_jax.models import blocks as layers
from mae_jax.port.keys import entries, from_fair, to_fair
from mae_jax.train import classification, engines, mixing, objective, optimizers
from mae_jax.train import step as steps
from parity import torch_inputs, torch_mae, torch_train
from parity.bounds import Pair, Pairs
from parity.sides import Ours, Reference
from parity.training import at, without_key_bias

CLASSES = 5
STEPS = 5  # of fine-tuning and of probing
RATE = 1e-3


class Transfer:
    """A classifier on the reference's encoder, with random weights elsewhere, and batches with classes."""

    def __init__(self, reference: Reference, model: dict[str, Any] | None = None, **changes: Any) -> None:
        """Make one with changes of the model and of the run."""
        self.precision, batch_size = reference.precision, reference.run_config.batch_size
        config = FinetuneConfig(
            model=replace(reference.config, encoder_mask_tokens=False, **(model or {})),
            augment=reference.run_config.augment,
            optim=OptimConfig(
                base_lr=RATE * 256 / batch_size, warmup_epochs=0, schedule="constant", beta1=0.8, beta2=0.99, eps=1e-7
            ),
            batch_size=batch_size,
            classes=CLASSES,
            drop_path=0.2,
            layer_decay=0.65,
            mix=MixConfig(smoothing=0.1, mixup=0.8, cutmix=1.0, erase=0.25),
        )
        self.config = replace(config, **changes)
        generator = np.random.default_rng(reference.run_config.seed)
        self.labels = generator.integers(0, CLASSES, (STEPS, batch_size)).astype(np.int32)
        self.bytes, self.positions = reference.bytes, reference.positions
        drawn = {entry.key: 0.1 * generator.standard_normal(entry.shape) for entry in entries(self.classifier)}
        shared = {key: values for key, values in reference.weights.items() if key in drawn}
        drawn |= {key: values for key, values in shared.items() if values.shape == drawn[key].shape}
        for key in ("fc_norm.weight", "norm.weight"):
            if key in drawn:
                drawn[key] = 1 + 0.1 * generator.standard_normal(drawn[key].shape)
        self.weights = {key: values.astype(self.precision) for key, values in drawn.items()}
        self.params: Params = jax.tree.map(jnp.asarray, from_fair(self.weights, self.classifier))

    @property
    def classifier(self) -> ClassifierConfig:
        return self.config.classifier

    def torch_model(self) -> torch_mae.Classifier:
        """Make the reference with the same weights."""
        model = torch_mae.Classifier(self.classifier).to(getattr(torch, self.precision))
        model.load_state_dict({key: torch.from_numpy(v) for key, v in self.weights.items()}, strict=False)
        return model

    def batch(self, step: int) -> objective.Batch:
        return objective.Batch(self.bytes[step], self.positions[step], labels=self.labels[step])

    @cached_property
    def inputs(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Make each step's batch for the reference: images (B, C, H, W), targets, and drop path's uniforms."""
        rows = zip(self.bytes, self.labels, self.positions, range(STEPS), strict=False)
        return [torch_inputs.classification_inputs(self.config, *row) for row in rows]

    def torch_batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return images (B, C, H, W), targets, and what drop path multiplies by."""
        images, targets, uniforms = self.inputs[step]
        return images, targets, torch_train.survival(uniforms, self.config.drop_path)

    def examples(self, step: int) -> classification.Examples:
        """Return the same batch for our model, where it is compared by itself; its steps make their own."""
        images, targets, uniforms = self.inputs[step]
        arrays = (jnp.asarray(values.numpy()) for values in (images.movedim(1, -1), targets, uniforms))
        return classification.Examples(*arrays)

    def run(self, params: Params) -> tuple[list[steps.Metrics], Params, Params]:
        """Run the compiled steps over two devices where there are two: metrics, parameters, and their average."""
        make_step = partial(steps.make_step, self.config, steps_per_epoch=STEPS, epochs=1.0)
        devices, batch_size = jax.local_devices()[:2], self.config.batch_size
        devices = devices if batch_size % (2 * len(devices)) == 0 else devices[:1]
        engine = engines.pmap_engine(lambda axis: make_step(axis_name=axis), devices, batch_size, 1)
        begun = jax.jit(lambda: steps.init_state(self.config))()
        copies = {"params": jax.tree.map(jnp.copy, params)}
        if self.config.optim.ema_decay is not None:
            copies["average"] = jax.tree.map(jnp.copy, params)
        state, metrics = engine.put_state(begun._replace(**copies)), []
        for step in range(STEPS):
            state, measured = engine.step(state, engine.put_batch(self.batch(step)))
            metrics.append(jax.device_get(measured))
        return metrics, jax.device_get(state.params), jax.device_get(state.average)


def targets(ours: Ours, reference: Reference) -> Pairs:
    """Compare label smoothing, mixup and cutmix, given the same draws."""
    generator = np.random.default_rng(reference.run_config.seed)
    dtype, images = reference.precision, reference.images[0]
    labels = generator.integers(0, CLASSES, len(images))
    plain = mixing.smooth_targets(jnp.asarray(labels), CLASSES, 0.1, dtype)
    theirs = torch_inputs.smoothed(torch.from_numpy(labels), CLASSES, 0.1, images.dtype)
    yield Pair("label smoothing", "targets", plain, theirs, "stage")
    for share, centre in ((0.3, (0.1, 0.6)), (0.9, (0.5, 0.5)), (0.0, (0.4, 0.7)), (1.0, (0.2, 0.9))):
        drawn = f"share {share}"
        ours_mixed = mixing.mixup(ours.images, plain, jnp.asarray(share, dtype))
        for what, mine, other in zip(
            ("images", "targets"), ours_mixed, torch_inputs.mixup(images, theirs, share), strict=True
        ):
            yield Pair("mixup", f"{what}, {drawn}", mine, _like_ours(other), "stage")
        box = mixing.cutmix_box(jnp.asarray(share, dtype), jnp.asarray(centre, dtype), *images.shape[2:])
        ours_cut = mixing.cutmix(ours.images, plain, box)
        their_cut = torch_inputs.cutmix(images, theirs, share, centre)
        yield Pair("cutmix", f"images, {drawn}", ours_cut[0], _like_ours(their_cut[0]), "exact")
        yield Pair("cutmix", f"targets, {drawn}", ours_cut[1], their_cut[1], "stage")


def _like_ours(values: torch.Tensor) -> torch.Tensor:
    return values.movedim(1, -1) if values.ndim == 4 else values


def drop_path(ours: Ours, reference: Reference) -> Pairs:
    """Compare what drop path multiplies branches by, and its expectation with 1."""
    depth, count, rate = 4, 400, 0.3
    grid = np.broadcast_to(((np.arange(count) + 0.5) / count)[:, None, None], (count, depth, 2))
    grid = grid.astype(reference.precision)
    factors = layers.drop_path(jnp.asarray(grid), rate)
    theirs = torch_train.survival(torch.from_numpy(grid.copy()), rate)
    yield Pair("drop path", "factors", factors, theirs, "stage")
    expectation = np.asarray(factors).mean(axis=0, dtype=np.float64).astype(reference.precision)
    yield Pair("drop path", "expectation", expectation, np.ones((depth, 2)), "stage")


# Classifiers whose forward pass and gradient are compared: pooling, and what their model has otherwise.
CLASSIFIERS: dict[str, tuple[Pooling, dict[str, Any]]] = {
    "mean": ("mean", {}),
    "class": ("class", {}),
    "mean, remat": ("mean", {"remat": True}),
    "mean, learned positions, no class token": ("mean", {"positions": "learned", "class_token": False}),
}


def classifier(ours: Ours, reference: Reference) -> Pairs:
    """Compare logits, loss and every gradient of the classifier, with drop path, on mixed images and targets."""
    for name, (pooling, model_changes) in CLASSIFIERS.items():
        transfer = Transfer(reference, model_changes, pooling=pooling)
        task, inputs = classification.Classification(transfer.config), transfer.examples(0)
        model = transfer.torch_model()
        images, goal, survival = transfer.torch_batch(0)
        logits = model(images, survival)
        loss = torch_train.soft_cross_entropy(logits, goal)
        named = {key: p for key, p in model.named_parameters() if p.requires_grad}
        gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        (found, _), computed = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(transfer.params, inputs)
        run = jax.jit(classification.Classifier(transfer.classifier).apply)
        stage = f"classifier, {name}"
        yield Pair(stage, "logits", run({"params": transfer.params}, inputs.images, inputs.uniforms), logits, "forward")
        yield Pair(stage, "loss", found, loss, "forward")
        by_name = to_fair(computed, transfer.classifier)
        for key in reversed([entry.key for entry in entries(transfer.classifier)]):
            yield Pair(f"{stage}: gradients", key, by_name[key], gradients[key], "gradient")


def layer_decay(ours: Ours, reference: Reference) -> Pairs:
    """Compare the share of the learning rate that each parameter gets, and which decay."""
    poolings: tuple[Pooling, ...] = ("mean", "class")
    for pooling in poolings:
        transfer = Transfer(reference, {"positions": "learned"}, pooling=pooling)
        config, model = transfer.config, transfer.torch_model()
        rates = optimizers.layer_rates(transfer.params, config.model.encoder.depth, config.layer_decay)
        decays = optimizers.kernel_mask(transfer.params)
        theirs = torch_train.layer_rates(model, config.layer_decay)
        groups = torch_train.finetuning_adamw(model, config).param_groups
        their_decays = {id(group["params"][0]): group["weight_decay"] > 0 for group in groups}
        parameters = dict(model.named_parameters())
        for entry in entries(transfer.classifier):
            name = f"{pooling}, {entry.key}"
            yield Pair("layer decay", name, at(rates, entry.path), theirs[entry.key], "exact")
            does = their_decays[id(parameters[entry.key])]
            yield Pair("weight decay in fine-tuning", name, at(decays, entry.path), does, "exact")
    # A power of 12 and more, whose last digits show how it is computed.
    deep = Transfer(reference, {"encoder": TransformerConfig(8, 13, 1), "decoder": TransformerConfig(8, 1, 1)})
    rates = optimizers.layer_rates(deep.params, 13, 0.65)
    theirs = torch_train.layer_rates(deep.torch_model(), 0.65)
    for entry in entries(deep.classifier):
        yield Pair("layer decay", f"13 blocks, {entry.key}", at(rates, entry.path), theirs[entry.key], "exact")


def finetuning(ours: Ours, reference: Reference) -> Pairs:
    """Compare fine-tuning with layer decay, drop path, erasing and mixing; then of the last block alone, averaged.

    Losses, and in float64 the weights at the end.
    """
    optim = Transfer(reference).config.optim
    partly: dict[str, Any] = {
        "last_blocks": 1,
        "pooling": "class",
        "optim": replace(optim, ema_decay=0.7, clip_norm=1.0),
    }
    runs: dict[str, dict[str, Any]] = {"fine-tuning": {}, "fine-tuning of the last block": partly}
    for stage, changes in runs.items():
        transfer = Transfer(reference, **changes)
        metrics, final, average = transfer.run(transfer.params)
        model = transfer.torch_model()
        trained = torch_train.last_blocks(model, transfer.config.last_blocks)
        batches = [transfer.torch_batch(step) for step in range(STEPS)]
        theirs = torch_train.finetune(model, transfer.config, batches, RATE)
        yield Pair(stage, "losses", np.array([m.loss for m in metrics]), np.array(theirs.losses), "training")
        if reference.precision == "float32":
            continue
        ended = {"": (final, theirs.final)}
        if average is not None:
            ended[", average"] = (average, theirs.average)
        for what, (mine, other) in ended.items():
            for name, values in to_fair(mine, transfer.classifier).items():
                if name in trained:
                    ours_final, expected = (without_key_bias(name, weights) for weights in (values, other[name]))
                    yield Pair(stage, f"{name}{what}", ours_final, expected, "training")
                elif name in transfer.weights:
                    yield Pair(stage, f"{name}{what}, not trained", values, transfer.weights[name], "exact")


def _probe(reference: Reference, **changes: Any) -> Transfer:
    """Make a linear probe with LARS, BatchNorm and a running average."""
    optim = OptimConfig(
        optimizer="lars",
        base_lr=100 * RATE * 256 / reference.run_config.batch_size,
        warmup_epochs=0,
        schedule="constant",
        weight_decay=0.01,
        trust=0.1,
        ema_decay=0.6,
    )
    frozen: dict[str, Any] = {
        "last_blocks": 0,
        "batch_norm": True,
        "layer_decay": 1.0,
        "drop_path": 0.0,
        "mix": MixConfig(),
    }
    pooling = "class" if reference.config.class_token else "mean"
    return Transfer(reference, **(frozen | {"optim": optim, "pooling": pooling} | changes))


def _statistics(transfer: Transfer) -> Params:
    """Make BatchNorm's statistics before the first step."""
    width, dtype = transfer.config.model.encoder.width, transfer.precision
    return {"mean": jnp.zeros(width, dtype), "variance": jnp.ones(width, dtype)}


def _features(transfer: Transfer, step: int) -> torch.Tensor:
    """Compute what the reference's frozen encoder gives of a batch."""
    with torch.no_grad():
        return transfer.torch_model().pool(transfer.torch_batch(step)[0])


def probing(ours: Ours, reference: Reference) -> Pairs:
    """Compare linear probing: LARS, BatchNorm, its running statistics, and their place in the average, on devices."""
    transfer = _probe(reference)
    metrics, final, average = transfer.run(transfer.params | {"statistics": _statistics(transfer)})

    optim, width = transfer.config.optim, transfer.config.model.encoder.width
    encoder, probe = transfer.torch_model(), torch_train.Probe(width, CLASSES).to(getattr(torch, reference.precision))
    probe.head.load_state_dict(encoder.head.state_dict())
    lars, losses = torch_train.Lars(probe.head, optim.momentum, optim.trust, optim.weight_decay), []
    averaged = torch_train.as_numpy(probe.head)
    for step in range(STEPS):
        probe.zero_grad()
        loss = torch_train.soft_cross_entropy(probe(_features(transfer, step)), transfer.torch_batch(step)[1])
        loss.backward()
        lars.step(100 * RATE)
        averaged = torch_train.averaged(averaged, probe.head, optim.ema_decay)
        losses.append(loss.item())
    stage = "linear probing"
    yield Pair(stage, "losses", np.array([m.loss for m in metrics]), np.array(losses), "training")
    yield Pair(stage, "LARS: kernel", final["head"]["kernel"], probe.head.weight.T, "training")
    yield Pair(stage, "LARS: bias", final["head"]["bias"], probe.head.bias, "training")
    yield Pair(stage, "average: kernel", average["head"]["kernel"], averaged["weight"].T, "training")
    yield Pair(stage, "average: bias", average["head"]["bias"], averaged["bias"], "training")
    for what, params in {"": final, "average: ": average}.items():
        found = params["statistics"]
        yield Pair(stage, f"{what}BatchNorm: mean", found["mean"], probe.norm.running_mean, "training")
        yield Pair(stage, f"{what}BatchNorm: variance", found["variance"], probe.norm.running_var, "training")
        ended = {name: part for name, part in params.items() if name != "statistics"}
        for name, values in to_fair(ended, transfer.classifier).items():
            if name in transfer.weights and not name.startswith("head"):
                yield Pair(f"{stage}: frozen encoder", f"{what}{name}", values, transfer.weights[name], "exact")
    probe.eval()
    folded = classification.fold_batch_norm(jax.tree.map(jnp.asarray, final))
    logits = classification.Classifier(transfer.classifier).apply({"params": folded}, transfer.examples(0).images)
    with torch.no_grad():
        yield Pair(stage, "BatchNorm put into the head", logits, probe(_features(transfer, 0)), "training")


def sweep(ours: Ours, reference: Reference) -> Pairs:
    """Compare several heads that learn at once with each by itself; one has a rate with which it diverges.

    What is reported is the loss of the best of the others. One that has diverged stays as it is.
    """
    plain = _probe(reference)
    rates = tuple(plain.config.optim.base_lr * factor for factor in (1.0, 0.25, 1e20))
    transfer = _probe(reference, sweep=rates)
    head = {name: jnp.stack([values] * len(rates)) for name, values in plain.params["head"].items()}
    metrics, final, _ = transfer.run(transfer.params | {"statistics": _statistics(transfer), "head": head})

    optim, width = transfer.config.optim, transfer.config.model.encoder.width
    every_loss, encoder = [], transfer.torch_model()
    for number, base in enumerate(rates):
        probe = torch_train.Probe(width, CLASSES).to(getattr(torch, reference.precision))
        probe.head.load_state_dict(encoder.head.state_dict())
        lars, losses = torch_train.Lars(probe.head, optim.momentum, optim.trust, optim.weight_decay), []
        for step in range(STEPS):
            if any(p.abs().max() >= 1e15 for p in probe.head.parameters()):
                losses.append(math.inf)
                continue
            probe.zero_grad()
            loss = torch_train.soft_cross_entropy(probe(_features(transfer, step)), transfer.torch_batch(step)[1])
            loss.backward()
            lars.step(base * transfer.config.batch_size / 256)
            losses.append(loss.item())
        every_loss.append(losses)
        kernel, bias = final["head"]["kernel"][number], final["head"]["bias"][number]
        yield Pair("sweep", f"rate {number}: kernel", kernel, probe.head.weight.T, "training")
        yield Pair("sweep", f"rate {number}: bias", bias, probe.head.bias, "training")
    yield Pair("sweep", "losses", np.array([m.loss for m in metrics]), np.min(every_loss, axis=0), "training")


TRANSFER = (targets, drop_path, layer_decay, classifier, probing, sweep, finetuning)
