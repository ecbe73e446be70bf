"""What comes after pretraining: classifier, augmentation of batches, fine-tuning and linear probing."""

from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from mae_jax.config import ClassifierConfig, FinetuneConfig, MixConfig, OptimConfig
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

    def __init__(self, ours: Ours, reference: Reference, **changes: Any) -> None:
        self.precision, batch_size = reference.precision, reference.run_config.batch_size
        model = replace(reference.config, encoder_mask_tokens=False)
        config = FinetuneConfig(
            model=model,
            augment=reference.run_config.augment,
            optim=OptimConfig(base_lr=RATE * 256 / batch_size, warmup_epochs=0, schedule="constant", beta2=0.999),
            batch_size=batch_size,
            classes=CLASSES,
            drop_path=0.2,
            layer_decay=0.65,
            mix=MixConfig(smoothing=0.1, mixup=0.8, cutmix=1.0),
        )
        self.config = replace(config, **changes)
        generator = np.random.default_rng(reference.run_config.seed)
        self.labels = generator.integers(0, CLASSES, (STEPS, batch_size)).astype(np.int32)
        self.bytes, self.positions = reference.bytes, reference.positions
        drawn = {entry.key: 0.1 * generator.standard_normal(entry.shape) for entry in entries(self.classifier)}
        drawn |= {key: values for key, values in reference.weights.items() if key in drawn}
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

    def torch_inputs(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return images (B, C, H, W), targets, and what drop path multiplies by."""
        images, targets, uniforms = self.inputs[step]
        return images, targets, torch_train.survival(uniforms, self.config.drop_path)

    def examples(self, step: int) -> classification.Examples:
        """Return the same batch for our model, where it is compared by itself; its steps make their own."""
        images, targets, uniforms = self.inputs[step]
        arrays = (jnp.asarray(values.numpy()) for values in (images.movedim(1, -1), targets, uniforms))
        return classification.Examples(*arrays)

    def run(self, params: Params) -> tuple[list[steps.Metrics], Params]:
        """Run the compiled steps over two devices where there are two, from these parameters."""
        make_step = partial(steps.make_step, self.config, steps_per_epoch=STEPS, epochs=1.0)
        devices, batch_size = jax.local_devices()[:2], self.config.batch_size
        devices = devices if batch_size % (2 * len(devices)) == 0 else devices[:1]
        engine = engines.pmap_engine(lambda axis: make_step(axis_name=axis), devices, batch_size, 1)
        begun = jax.jit(lambda: steps.init_state(self.config))()
        state, metrics = engine.place(begun._replace(params=jax.tree.map(jnp.copy, params))), []
        for step in range(STEPS):
            state, measured = engine.step(state, engine.put(self.batch(step)))
            metrics.append(jax.device_get(measured))
        return metrics, jax.device_get(state.params)


def targets(ours: Ours, reference: Reference) -> Pairs:
    """Compare label smoothing, mixup and cutmix, given the same draws."""
    generator = np.random.default_rng(reference.run_config.seed)
    dtype, images = reference.precision, reference.images[0]
    labels = generator.integers(0, CLASSES, len(images))
    plain = mixing.smooth_targets(jnp.asarray(labels), CLASSES, 0.1, dtype)
    theirs = torch_inputs.smoothed(torch.from_numpy(labels), CLASSES, 0.1, images.dtype)
    yield Pair("label smoothing", "targets", plain, theirs, "stage")
    for share, centre in ((0.3, (0.1, 0.6)), (0.9, (0.5, 0.5)), (0.0, (0.4, 0.7))):
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


def classifier(ours: Ours, reference: Reference) -> Pairs:
    """Compare logits, loss and every gradient of the classifier, with drop path, on mixed images and targets."""
    for pooling in ("mean", "class"):
        if pooling == "class" and not reference.config.class_token:
            continue
        transfer = Transfer(ours, reference, pooling=pooling)
        task, inputs = classification.Classification(transfer.config), transfer.examples(0)
        model = transfer.torch_model()
        images, goal, survival = transfer.torch_inputs(0)
        logits = model(images, survival)
        loss = torch_train.soft_cross_entropy(logits, goal)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

        def ours_loss(
            params: Params, task: classification.Classification = task, inputs: Any = inputs
        ) -> tuple[jax.Array, Params]:
            return task.loss(params, inputs)

        (found, _), computed = jax.jit(jax.value_and_grad(ours_loss, has_aux=True))(transfer.params)
        run = jax.jit(classification.Classifier(transfer.classifier).apply)
        stage = f"classifier, {pooling}"
        yield Pair(stage, "logits", run({"params": transfer.params}, inputs.images, inputs.uniforms), logits, "forward")
        yield Pair(stage, "loss", found, loss, "forward")
        for name, values in to_fair(computed, transfer.classifier).items():
            if name in gradients:
                yield Pair(f"{stage}: gradients", name, values, gradients[name], "gradient")


def layer_decay(ours: Ours, reference: Reference) -> Pairs:
    """Compare the share of the learning rate that each parameter gets, and which decay."""
    transfer = Transfer(ours, reference)
    model = transfer.torch_model()
    rates = optimizers.layer_rates(transfer.params, transfer.config.model.encoder.depth, transfer.config.layer_decay)
    decays = optimizers.kernel_mask(transfer.params)
    theirs = torch_train.layer_rates(model, transfer.config.layer_decay)
    groups = torch_train.finetuning_adamw(model, transfer.config).param_groups
    their_decays = {id(group["params"][0]): group["weight_decay"] > 0 for group in groups}
    parameters = dict(model.named_parameters())
    table = list(entries(transfer.classifier))
    for entry in table:
        yield Pair("layer decay", entry.key, at(rates, entry.path), theirs[entry.key], "exact")
    for entry in table:
        does = their_decays[id(parameters[entry.key])]
        yield Pair("weight decay in fine-tuning", entry.key, at(decays, entry.path), does, "exact")


def finetuning(ours: Ours, reference: Reference) -> Pairs:
    """Compare fine-tuning with layer decay, drop path and mixing: losses, and in float64 the weights at the end."""
    transfer = Transfer(ours, reference)
    metrics, final = transfer.run(transfer.params)
    model = transfer.torch_model()
    optimizer, losses = torch_train.finetuning_adamw(model, transfer.config), []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * group["share"]
        images, goal, survival = transfer.torch_inputs(step)
        optimizer.zero_grad()
        loss = torch_train.soft_cross_entropy(model(images, survival), goal)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    yield Pair("fine-tuning", "losses", np.array([m.loss for m in metrics]), np.array(losses), "training")
    if reference.precision == "float64":
        theirs = torch_train.as_numpy(model)
        for name, values in to_fair(final, transfer.classifier).items():
            mine, other = (without_key_bias(name, weights) for weights in (values, theirs[name]))
            yield Pair("fine-tuning", name, mine, other, "training")


def probing(ours: Ours, reference: Reference) -> Pairs:
    """Compare linear probing: LARS, BatchNorm and its running statistics, on devices."""
    optim = OptimConfig(
        optimizer="lars",
        base_lr=100 * RATE * 256 / reference.run_config.batch_size,
        warmup_epochs=0,
        schedule="constant",
        weight_decay=0.01,
        trust=0.1,
    )
    pooling = "class" if reference.config.class_token else "mean"
    changes = {"last_blocks": 0, "batch_norm": True, "layer_decay": 1.0, "drop_path": 0.0, "mix": MixConfig()}
    transfer = Transfer(ours, reference, optim=optim, pooling=pooling, **changes)
    width, dtype = transfer.config.model.encoder.width, reference.precision
    statistics = {"mean": jnp.zeros(width, dtype), "variance": jnp.ones(width, dtype)}
    metrics, final = transfer.run(transfer.params | {"statistics": statistics})

    encoder, probe = transfer.torch_model(), torch_train.Probe(width, CLASSES).to(getattr(torch, dtype))
    probe.head.load_state_dict(encoder.head.state_dict())
    lars, losses = torch_train.Lars(probe.head, optim.momentum, optim.trust, optim.weight_decay), []
    for step in range(STEPS):
        images, goal, _ = transfer.torch_inputs(step)
        with torch.no_grad():
            features = encoder.pool(images)
        probe.zero_grad()
        loss = torch_train.soft_cross_entropy(probe(features), goal)
        loss.backward()
        lars.step(100 * RATE)
        losses.append(loss.item())
    stage = "linear probing"
    yield Pair(stage, "losses", np.array([m.loss for m in metrics]), np.array(losses), "training")
    yield Pair(stage, "LARS: kernel", final["head"]["kernel"], probe.head.weight.T, "training")
    yield Pair(stage, "LARS: bias", final["head"]["bias"], probe.head.bias, "training")
    yield Pair(stage, "BatchNorm: mean", final["statistics"]["mean"], probe.norm.running_mean, "training")
    yield Pair(stage, "BatchNorm: variance", final["statistics"]["variance"], probe.norm.running_var, "training")
    ended = {name: part for name, part in final.items() if name != "statistics"}
    for name, values in to_fair(ended, transfer.classifier).items():
        if name in transfer.weights and not name.startswith("head"):
            yield Pair(f"{stage}: frozen encoder", name, values, transfer.weights[name], "exact")
    probe.eval()
    images = transfer.torch_inputs(0)[0]
    folded = classification.fold_batch_norm(jax.tree.map(jnp.asarray, final))
    logits = classification.Classifier(transfer.classifier).apply({"params": folded}, transfer.examples(0).images)
    with torch.no_grad():
        yield Pair(stage, "BatchNorm put into the head", logits, probe(encoder.pool(images)), "training")


TRANSFER = (targets, drop_path, layer_decay, classifier, probing, finetuning)
