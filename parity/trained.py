"""Models of somebody's own: a run, a checkpoint, a file, a recipe, or a configuration with parameters and images.

A masked autoencoder goes through the stages that depend on a model. A classifier, or an encoder without a decoder, has
stages here: it sees every patch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import UInt8

from mae_jax.config import AugmentConfig, ClassifierConfig, FinetuneConfig, PretrainConfig
from mae_jax.data.evaluation import load_samples
from mae_jax.data.sources.source import open_source
from mae_jax.errors import StatedError
from mae_jax.evaluation.encoders import load_pretrained
from mae_jax.models import Params, blocks, classifier
from mae_jax.port.compare import Comparison
from mae_jax.port.keys import Config, Tensors, entries, from_fair, to_fair
from mae_jax.presets.pretraining import PRESETS
from mae_jax.train import classification, objective
from parity import torch_inputs, torch_mae
from parity.bounds import Pair, Pairs, Precision
from parity.bounds import compare as compare_pair
from parity.report import Report
from parity.sides import Given, Reference, draw_weights
from parity.stages import EVERY_MODEL, STAGES, run
from parity.training import module_of

Images = UInt8[np.ndarray, "n height width channels"]

# Stages of training that a recipe decides.
OF_A_RUN = ("update", "gradients_on_devices", "training")
MOST_IMAGES = 8  # of those that are given to `compare`


@dataclass(frozen=True)
class Subject:
    """What is compared, and what of it is given rather than drawn.

    notes: what was assumed, and what is not compared and why, in sentences.
    """

    name: str
    config: Config
    given: Given
    augment: AugmentConfig
    notes: tuple[str, ...] = ()


def of_source(source: str, data: str | None, count: int, encoder_heads: int | None = None) -> Subject:
    """Take a run, a checkpoint, or any file or folder that `mae-jax port` reads, with `count` images of its data.

    Raises:
      StatedError: it cannot be read, or there are no such images.
    """
    notes: list[str] = []
    found = load_pretrained(source, encoder_heads, log=lambda note: notes.append(note.removeprefix("note: ")))
    config, params = found.config, found.params
    if config.kind == "mae" and "decoder" not in params:
        notes.append("there is no decoder: the encoder is compared, with a head of its own, without mask and loss")
        config = ClassifierConfig(config, classes=2, pooling="class" if config.class_token else "mean")
        head = classifier.Classifier(config)
        shown = jnp.zeros((1, *config.model.image_hw, config.model.in_channels))
        params = head.init(jax.random.key(0), shown)["params"] | {"encoder": params["encoder"]}
    weights = to_fair(jax.tree.map(np.asarray, params), config)
    model = config if config.kind == "mae" else config.model
    named = data or found.data
    images = None
    if named is None:
        notes.append("no data is named: images are random bytes; --data SOURCE takes photographs")
    else:
        opened = open_source(named, model.in_channels)
        images = load_samples(opened, range(len(opened)), count, model.image_hw, found.augment.evaluation_crop)
    if found.run is None:
        notes.append("there is no recipe of pretraining with it: no step of training is compared")
    return Subject(source, config, Given(weights, images, found.run, found.augment), found.augment, tuple(notes))


def of_preset(name: str) -> Subject:
    """Take a recipe of pretraining, with random weights and images.

    Raises:
      StatedError: there is none of that name.
    """
    if name not in PRESETS:
        raise StatedError(f"preset {name} is none of {', '.join(PRESETS)}", field="preset")
    run = PRESETS[name]()
    return Subject(name, run.model, Given(run=run), run.augment, ("weights and images are drawn",))


def of_params(config: Config, params: Params, images: Images, augment: AugmentConfig | None, seed: int) -> Subject:
    """Take a model's configuration, its parameters, images as bytes, and the seed of the masks' noise.

    Raises:
      StatedError: images do not fit the model.
    """
    model = config if config.kind == "mae" else config.model
    if images.dtype != np.uint8 or images.shape[1:] != (*model.image_hw, model.in_channels):
        raise StatedError(
            f"images are {images.dtype} {images.shape}; the model takes uint8 (any number, "
            f"{', '.join(map(str, (*model.image_hw, model.in_channels)))})",
            field="images",
        )
    channels = model.in_channels
    augment = augment or AugmentConfig(mean=(0.5,) * channels, std=(0.25,) * channels)
    weights = to_fair(jax.tree.map(np.asarray, params), config)
    run = PretrainConfig(model=model, augment=augment, seed=seed)
    return Subject("model", config, Given(weights, images, run), augment)


def stages_of(subject: Subject) -> list[str]:
    """List the stages of a masked autoencoder that depend on it: its weights, or what a run makes of them."""
    trained = subject.given.run is not None and subject.given.run.optim.optimizer == "adamw"
    return [name for name in STAGES if name in EVERY_MODEL or (trained and name in OF_A_RUN)]


def compare_subject(
    subject: Subject, precision: Precision, seed: int, batch_size: int, stages: Sequence[str] = (), stop: bool = False
) -> Iterator[list[Comparison]]:
    """Run the stages of a subject, and yield the results of one after another.

    Raises:
      StatedError: stages are chosen, and it is a classifier, which is compared as a whole.
    """
    if subject.config.kind == "mae":
        reference = Reference(subject.config, precision, seed, batch_size, subject.name, subject.given)
        yield from run([reference], stages or stages_of(subject), stop)
        return
    if stages:
        raise StatedError(
            f"stages {' '.join(stages)} are a masked autoencoder's, {subject.name} is compared as a classifier: leave "
            "them out",
            field="stages",
        )
    with jax.enable_x64(precision == "float64"), jax.default_matmul_precision("highest"):
        pairs = classifier_pairs(ClassifierReference(subject, precision, seed, batch_size))
        found = [compare_pair(pair, precision, jax.default_backend()) for pair in pairs]
    for _, group in groupby(found, key=lambda result: result.stage):
        yield list(group)


def compare(
    config: Config,
    params: Params,
    images: Images,
    *,
    augment: AugmentConfig | None = None,
    precision: Precision = "float64",
    seed: int = 0,
) -> Report:
    """Compare what a model computes of images with what PyTorch computes, stage by stage, and return the report.

    Args:
      config: of a masked autoencoder or a classifier; its dtype is replaced by `precision`.
      params: its parameters, as `MaskedAutoencoder(config).init` nests them.
      images: uint8 (number, height, width, channels), of the model's size; the first eight are used.
      augment: the mean and deviation that pixels are normalised with; by default 0.5 and 0.25.
      precision: of both sides. A difference in meaning shows in float64.
      seed: of the mask noise.

    Raises:
      StatedError: images do not fit the model.

    Example:
      >>> report = parity.compare(config, params, images)
      >>> report.passed
      True
    """
    subject = of_params(config, params, images, augment, seed)
    count = min(len(images), MOST_IMAGES)
    report = Report.begin(subject.name, precision, seed, {subject.name: config})
    stages = [name for name in stages_of(subject) if name not in OF_A_RUN and name != "noise"]
    for results in compare_subject(subject, precision, seed, count, stages if config.kind == "mae" else ()):
        report.results += results
    return report


# --- classifiers, and encoders without a decoder ----------------------------------------------------------------------


class ClassifierReference:
    """A classifier of PyTorch with given weights, and all that it makes of images."""

    def __init__(self, subject: Subject, precision: Precision, seed: int, batch_size: int) -> None:
        assert subject.config.kind == "classifier"
        self.name, self.precision = subject.name, precision
        model = replace(subject.config.model, dtype=precision, attention="xla", remat=False)
        self.config, self.augment = replace(subject.config, model=model), subject.augment
        generator = np.random.default_rng(seed)
        shape = (batch_size, *model.image_hw, model.in_channels)
        images = subject.given.images
        self.bytes = (
            generator.integers(0, 256, shape, dtype=np.uint8)
            if images is None
            else images[np.arange(batch_size) % len(images)]
        )
        self.labels = generator.integers(0, self.config.classes, batch_size)
        dtype = getattr(torch, precision)
        self.model = torch_mae.Classifier(self.config).to(dtype)
        weights = subject.given.weights or draw_weights(self.model, generator)
        fixed = {name: p for name, p in self.model.state_dict().items() if name.endswith("pos_embed")}
        self.model.load_state_dict(fixed | {name: torch.tensor(v, dtype=dtype) for name, v in weights.items()})
        self.weights: Tensors = {n: p.detach().numpy() for n, p in self.model.named_parameters() if p.requires_grad}
        self.images = torch_inputs.normalise(self.bytes, self.augment, dtype)

    @cached_property
    def stages(self) -> Tensors:
        """Compute every intermediate of the forward pass, and the loss of the labels."""
        stages = {"encoder.input": self.model.embed(self.images)}
        x = stages["encoder.input"]
        for number, block in enumerate(self.model.blocks):
            x = stages[f"encoder.block_{number}"] = block(x)
        stages["features"] = self.model.pooled(x)
        stages["logits"] = self.model.head(stages["features"])
        return {name: values.detach().numpy() for name, values in stages.items()}

    @cached_property
    def gradients(self) -> tuple[float, Tensors]:
        """Compute the cross entropy of the labels, and its gradient."""
        loss = torch.nn.functional.cross_entropy(self.model(self.images), torch.from_numpy(self.labels))
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(loss, list(named.values()))
        return loss.item(), {name: values.numpy() for name, values in zip(named, found, strict=True)}


def classifier_pairs(reference: ClassifierReference) -> Pairs:
    """Compare a classifier from bytes to its gradients, in the order data flows."""
    config, stack = reference.config, reference.config.model.encoder
    params = jax.tree.map(jnp.asarray, from_fair(reference.weights, config))
    model, theirs = classifier.Classifier(config), reference.stages
    images = jnp.asarray(reference.images.movedim(1, -1).numpy())
    normalised = objective.normalise_images(reference.bytes, reference.augment, config.model.dtype)
    yield Pair("images", "images", normalised, images, "stage")

    def recorded(params: Params, images: jax.Array) -> dict[str, Any]:
        returned = {}

        def record(call: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            values = call(*args, **kwargs)
            if isinstance(values, jax.Array) and context.method_name in ("__call__", "embed", "pool"):
                returned["/".join(context.module.path) + "." + context.method_name] = values
            return values

        with jax.disable_jit(), nn.intercept_methods(record):
            model.apply({"params": params}, images)
        return returned

    returned = jax.jit(recorded)(params, images)
    yield Pair("encoder input", "whole pass", returned["encoder.embed"], theirs["encoder.input"], "forward")
    block = jax.jit(lambda params, x: blocks.Block(stack, config.model.dtype).apply({"params": params}, x))
    x = theirs["encoder.input"]
    for number in range(stack.depth):
        stage, expected = f"encoder block {number}", theirs[f"encoder.block_{number}"]
        yield Pair(stage, "same input", block(params["encoder"][f"block_{number}"], x), expected, "stage")
        yield Pair(stage, "whole pass", returned[f"encoder/block_{number}.__call__"], expected, "forward")
        x = expected
    yield Pair("features", "whole pass", returned[".pool"], theirs["features"], "forward")
    yield Pair("logits", "whole pass", returned[".__call__"], theirs["logits"], "forward")

    tuned = FinetuneConfig(
        model=config.model, augment=reference.augment, classes=config.classes, pooling=config.pooling
    )
    task = classification.Classification(tuned)
    targets = jax.nn.one_hot(reference.labels, config.classes, dtype=config.model.dtype)
    examples = classification.Examples(images, targets, jnp.zeros((len(images), stack.depth, 2), config.model.dtype))
    (loss, _), computed = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(params, examples)
    their_loss, gradients = reference.gradients
    yield Pair("loss", "cross entropy", loss, np.asarray(their_loss, reference.precision), "forward")
    by_name = to_fair(computed, config)
    for key in reversed([entry.key for entry in entries(config)]):
        yield Pair(f"gradient {module_of(key)}", key, by_name[key], gradients[key], "gradient")
