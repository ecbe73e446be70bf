"""The objective of fine-tuning and linear probing: predicting the class of an image (He et al. 2021, appendix A.1)."""

from dataclasses import dataclass
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from mae_jax import rng
from mae_jax.config import FinetuneConfig, OptimConfig, wide
from mae_jax.models import Params
from mae_jax.models.classifier import Classifier, Pooled
from mae_jax.models.patches import Images
from mae_jax.train import optimizers
from mae_jax.train.mixing import Targets, erase, mix, smooth_targets
from mae_jax.train.objective import Batch, normalise_images

BATCH_NORM_EPS = 1e-6
BATCH_NORM_MOMENTUM = 0.1  # PyTorch's: the share of the new batch in the running statistics

Logits = Float[Array, "*heads batch classes"]


class Examples(NamedTuple):
    """What the loss is computed of."""

    images: Images
    targets: Targets
    uniforms: Float[Array, "batch depth 2"]  # of drop path


@dataclass(frozen=True)
class Classification:
    """Cross entropy of a classifier, or of several at once, each with its own head and rate.

    axis_name: of the devices that BatchNorm takes its statistics over, where the step is one device's.
    """

    config: FinetuneConfig
    axis_name: str | None = None

    @property
    def group_size(self) -> int:
        """Return 2 where neighbours are mixed with each other, else 1."""
        return 2 if self.config.mix.mixes else 1

    def init(self) -> Params:
        """Make a random classifier; `start_from` gives it the weights of an encoder."""
        config, model = self.config, self.config.model
        images = jnp.zeros((1, *model.image_hw, model.in_channels), wide(model.dtype))
        init = jax.jit(lambda key: Classifier(config.classifier).init(key, images)["params"])
        # The head has a stream of its own, so that the encoder does not depend on how many classes or heads there are.
        params = init(rng.device_key(config.seed, "init"))
        shape = (*((len(config.sweep),) if config.sweep else ()), *params["head"]["kernel"].shape)
        # The authors cut the normal off at +-2, far beyond any that is drawn. All heads of a sweep begin alike.
        drawn = jax.random.normal(rng.device_key(config.seed, "head"), shape[-2:], wide(model.dtype))
        params["head"] = {
            "kernel": jnp.broadcast_to(config.head_std * drawn, shape),
            "bias": jnp.zeros((*shape[:-2], shape[-1]), wide(model.dtype)),
        }
        if config.batch_norm:
            mean = jnp.zeros(model.encoder.width, wide(model.dtype))
            params["statistics"] = {"mean": mean, "variance": jnp.ones_like(mean)}
        return params

    def trained(self, path: tuple[str, ...]) -> bool:
        """Return whether a parameter is trained: all are, or the head and the last blocks; no statistics."""
        last = self.config.last_blocks
        if path[0] == "statistics":
            return False
        if path[0] == "head" or last is None:
            return True
        if last == 0:
            return False
        depth = self.config.model.encoder.depth
        follows = path[0] == "fc_norm" or path[1] == "norm"
        return follows or path[1] in {f"block_{number}" for number in range(depth - last, depth)}

    def direction(self, optim: OptimConfig) -> optax.GradientTransformation:
        optimizer = optimizers.direction(optim, optimizers.kernel_mask)
        return optimizers.per_head(optimizer) if self.config.sweep else optimizer

    def rates(self, params: Params) -> Params | None:
        """Return layer decay; in a sweep each head's own rate over the configured one."""
        config = self.config
        if config.sweep:
            ratio = np.array(config.sweep) / config.optim.base_lr
            return jax.tree.map(lambda p: jnp.asarray(ratio, p.dtype).reshape(-1, *[1] * (p.ndim - 1)), params)
        if config.layer_decay == 1:
            return None
        return optimizers.layer_rates(params, config.model.encoder.depth, config.layer_decay)

    def inputs(self, batch: Batch, pixels: Array, step: Int[Array, ""]) -> Examples:
        """Make normalised, erased, mixed images and their targets; draw drop path's uniforms."""
        config, dtype = self.config, wide(self.config.model.dtype)
        assert batch.labels is not None
        assert config.classes is not None
        # In timm's order: erasing works on normalised pixels (its noise is normal), and mixing comes last.
        images = normalise_images(pixels, config.augment, dtype)
        images = erase(images, rng.device_key(config.seed, "erase"), jnp.asarray(batch.positions), config.mix.erase)
        targets = smooth_targets(jnp.asarray(batch.labels), config.classes, config.mix.smoothing, dtype)
        images, targets = mix(images, targets, jax.random.fold_in(rng.device_key(config.seed, "mix"), step), config.mix)
        # One uniform for each of a block's two branches, by the position of the example.
        depth = config.model.encoder.depth
        drawn = rng.example_uniforms(rng.device_key(config.seed, "drop_path"), batch.positions, 2 * depth)
        return Examples(images, targets, drawn.reshape(-1, depth, 2).astype(dtype))

    def loss(self, params: Params, inputs: Examples) -> tuple[Float[Array, ""], Params]:
        config, variables = self.config, {"params": params}
        model = Classifier(config.classifier)
        uniforms = inputs.uniforms if config.drop_path else None
        if config.last_blocks != 0:
            logits = cast(Logits, model.apply(variables, inputs.images, uniforms))
            return optax.softmax_cross_entropy(logits, inputs.targets).mean(), {}

        # Linear probing: the encoder is frozen, and what it gives goes through BatchNorm into one head, or several.
        features = cast(Pooled, model.apply(variables, inputs.images, uniforms, method="pool"))
        replaced: Params = {}
        if config.batch_norm:
            mean, variance = self._moments(features)
            features = (features - mean) * jax.lax.rsqrt(variance + BATCH_NORM_EPS)
            replaced = {"statistics": _running(params["statistics"], mean, variance, config.batch_size)}
        head = params["head"]
        if config.sweep:  # neither loss nor gradient of a head that has diverged may reach the sum of the others
            head = optimizers.zero_where_diverged(head, optimizers.not_diverged(head))
        logits = head_logits(head, features)
        errors = optax.softmax_cross_entropy(logits, inputs.targets).mean(axis=-1)
        if not config.sweep:
            return errors, replaced
        # The sum is minimised, which minimises each head by itself. Its gradient is kept and its value replaced: the
        # loss that is reported is that of the best head, of the batch of all devices (with accumulate, of each part).
        total = errors.sum()
        whole = errors if self.axis_name is None else jax.lax.pmean(errors, self.axis_name)
        best = jnp.where(optimizers.not_diverged(params["head"]), whole, jnp.inf).min()
        return jax.lax.stop_gradient(best - total) + total, replaced

    def _moments(self, features: Pooled) -> tuple[Float[Array, " width"], Float[Array, " width"]]:
        """Compute mean and (biased) variance of the whole batch, on however many devices."""
        # Devices have equally many rows, so the mean of their means is the mean of all. Each needs that mean before it
        # can measure the deviations from it: two exchanges, and the variance does not lose digits.
        mean = features.mean(axis=0)
        mean = mean if self.axis_name is None else jax.lax.pmean(mean, self.axis_name)
        variance = jnp.square(features - mean).mean(axis=0)
        return mean, variance if self.axis_name is None else jax.lax.pmean(variance, self.axis_name)


def head_logits(head: Params, features: Pooled) -> Logits:
    """Compute the logits of one head, or of several that are stacked along the first axis."""
    return jnp.einsum("bd,...dc->...bc", features, head["kernel"]) + head["bias"][..., None, :]


def _running(old: Params, mean: Array, variance: Array, batch_size: int) -> Params:
    """Update the running statistics as PyTorch does: it keeps the unbiased variance."""
    unbiased = variance * (batch_size / max(1, batch_size - 1))
    new = {"mean": mean, "variance": unbiased}
    return {name: old[name] + BATCH_NORM_MOMENTUM * (new[name] - old[name]) for name in old}


def fold_batch_norm(params: Params) -> Params:
    """Fold BatchNorm, by its running statistics, into the head: the same logits from a classifier without it."""
    if "statistics" not in params:
        return params
    # (x - mean) / std * W + b = x * (W / std) + (b - mean * W / std).
    rest = {name: part for name, part in params.items() if name != "statistics"}
    mean, variance = params["statistics"]["mean"], params["statistics"]["variance"]
    kernel = params["head"]["kernel"] / jnp.sqrt(variance + BATCH_NORM_EPS)[:, None]
    bias = params["head"]["bias"] - jnp.einsum("d,...dc->...c", mean, kernel)
    return rest | {"head": {"kernel": kernel, "bias": bias}}
