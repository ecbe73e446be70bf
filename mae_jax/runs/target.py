"""The PCA target of a run (He et al. 2021, Table 1d): mean and basis of the patches that it is trained on.

Fitted once, before the first step, to patches of the run's first crops, in float64 on the host.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float

from mae_jax import rng
from mae_jax.config import PretrainConfig, wide
from mae_jax.data.sources.source import Source
from mae_jax.data.stream import TrainingBatch, training_batches
from mae_jax.hosts import Hosts
from mae_jax.models.patches import patchify
from mae_jax.train.crops import crop_images
from mae_jax.train.objective import normalise_images
from mae_jax.train.step import TrainState

# 2^16 patches; a few of each crop, since those of one picture are alike.
CROPS, PATCHES = 4096, 16
_AT_ONCE = 64  # crops that are floating-point numbers at a time

Sample = Float[np.ndarray, "sampled values"]


class Components(NamedTuple):
    """The directions of the largest variance, largest first, and the share of all variance that lies in them.

    Signs are free: the largest entry of each direction is positive.
    """

    mean: Float[np.ndarray, " values"]
    basis: Float[np.ndarray, "values components"]
    share: float


def principal_components(samples: Iterator[Sample], count: int) -> Components:
    """Find the principal components of all patches together; only the sums that make their covariance are kept."""
    total, first, second = 0, np.zeros(()), np.zeros(())
    for patches in samples:
        total, first, second = total + len(patches), first + patches.sum(axis=0), second + patches.T @ patches
    mean = first / total
    variances, directions = np.linalg.eigh(second / total - np.outer(mean, mean))  # smallest first
    basis = directions[:, ::-1][:, :count]
    largest = basis[np.abs(basis).argmax(axis=0), np.arange(count)]
    return Components(mean, basis * np.sign(largest), float(variances[::-1][:count].sum() / variances.sum()))


def sampled_patches(config: PretrainConfig, source: Source) -> Iterator[Sample]:
    """Sample PATCHES of each of the first CROPS of the training stream, as the model sees them."""
    left = CROPS
    stop = math.ceil(CROPS / config.batch_size)
    with training_batches(source, config, stop_step=stop) as batches:
        for batch in batches:
            yield from _of_batch(batch, config, min(left, config.batch_size))
            left -= config.batch_size


def _of_batch(batch: TrainingBatch, config: PretrainConfig, crops: int) -> Iterator[Sample]:
    model, boxes = config.model, batch.get("crop")
    per_crop = min(PATCHES, model.num_patches)
    for start in range(0, crops, _AT_ONCE):
        rows = slice(start, min(start + _AT_ONCE, crops))
        pixels = batch["image"][rows]
        if boxes is not None:
            pixels = np.asarray(crop_images(pixels, boxes[rows], model.image_hw))
        patches = patchify(normalise_images(pixels, config.augment, wide(model.dtype)), model.patch_hw)
        sampled = [
            rng.host_generator(config.seed, "target", int(position)).choice(model.num_patches, per_crop, replace=False)
            for position in batch["position"][rows]
        ]
        picked = np.take_along_axis(np.asarray(patches, np.float64), np.stack(sampled)[..., None], axis=1)
        yield picked.reshape(-1, model.patch_dim)


def with_fitted_target(
    state: TrainState, config: PretrainConfig, source: Source, hosts: Hosts, message: Callable[[str], None]
) -> TrainState:
    """Fit the target of the state before the first step, wherever its arrays lie; all hosts call it."""
    count = config.model.pca_components
    if count is None:
        return state
    mean, basis, share = principal_components(sampled_patches(config, source), count)
    message(f"the {count} largest principal components hold {share:.2%} of the variance of {CROPS:,} crops' patches")
    fitted = {"mean": mean.astype(wide(config.model.dtype)), "basis": basis.astype(wide(config.model.dtype))}
    if hosts.count > 1:  # other processors may round otherwise
        fitted = multihost_utils.broadcast_one_to_all(fitted)
    target = jax.tree.map(lambda x, like: jax.device_put(np.asarray(x), like.sharding), fitted, state.params["target"])
    average = None if state.average is None else state.average | {"target": jax.tree.map(jax.numpy.copy, target)}
    return state._replace(params=state.params | {"target": target}, average=average)
