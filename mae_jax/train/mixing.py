"""Mixup, cutmix, smoothed targets and random erasing, on the device (He et al. 2021, Table 9).

Which image is mixed with which follows from the positions of the stream alone: each with its neighbour, the even with
the odd. A shuffled stream makes that as good as any other choice, and neighbours lie on the same device.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from mae_jax.config import MixConfig
from mae_jax.models.patches import Images

Targets = Float[Array, "batch classes"]
Scalar = Float[Array, ""]

# Of the area, and height to width, of a rectangle that is erased: timm's defaults, as the authors use them.
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = 0.3
_TRIES = 10  # boxes that are drawn until one fits


def smooth_targets(labels: Int[Array, " batch"], classes: int, smoothing: float, dtype: str) -> Targets:
    """Turn each label into a row: 1 - smoothing on it, and smoothing spread over all classes, it included."""
    return jax.nn.one_hot(labels, classes, dtype=dtype) * (1 - smoothing) + smoothing / classes


def neighbours(x: Float[Array, "batch *rest"]) -> Float[Array, "batch *rest"]:
    """Return each row's partner: rows 0 and 1 change places, 2 and 3 ..."""
    return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)


def mixup(images: Images, targets: Targets, share: Scalar) -> tuple[Images, Targets]:
    """Add `share` of each image and 1 - `share` of its neighbour, classes alike (Zhang et al. 2017, equation 1)."""
    return images * share + neighbours(images) * (1 - share), targets * share + neighbours(targets) * (1 - share)


def cutmix(images: Images, targets: Targets, inside: Bool[Array, "height width"]) -> tuple[Images, Targets]:
    """Put the neighbour's pixels where `inside`, and weigh classes by the area of each (Yun et al. 2019)."""
    share = 1 - inside.mean(dtype=targets.dtype)
    return (
        jnp.where(inside[:, :, None], neighbours(images), images),
        targets * share + neighbours(targets) * (1 - share),
    )


def cutmix_box(share: Scalar, centre: Float[Array, "2"], height: int, width: int) -> Bool[Array, "height width"]:
    """Mark a rectangle of 1 - `share` of the image about a centre in [0, 1)^2, cut off at the edges."""
    ratio = jnp.sqrt(1 - share)

    def within(size: int, middle: Scalar) -> Bool[Array, " size"]:
        side, place, pixels = jnp.floor(size * ratio), jnp.floor(middle * size), jnp.arange(size)
        return (pixels >= place - side // 2) & (pixels < place + (side + 1) // 2)

    return within(height, centre[0])[:, None] & within(width, centre[1])[None, :]


def mix(images: Images, targets: Targets, key: Array, config: MixConfig) -> tuple[Images, Targets]:
    """Mix a whole batch by mixup or cutmix, one draw for all of it, as timm's mode `batch`."""
    if not config.mixes:
        return images, targets
    # Where only one of the two is on, the other is left out of the program; where both are, a draw decides.
    kind, area, place = jax.random.split(key, 3)
    dtype, (height, width) = images.dtype, images.shape[1:3]
    if config.cutmix == 0:
        return mixup(images, targets, jax.random.beta(area, config.mixup, config.mixup, dtype=dtype))
    box = cutmix_box(
        jax.random.beta(area, config.cutmix, config.cutmix, dtype=dtype), jax.random.uniform(place, (2,)), height, width
    )
    if config.mixup == 0:
        return cutmix(images, targets, box)
    share = jax.random.beta(area, config.mixup, config.mixup, dtype=dtype)
    return jax.lax.cond(
        jax.random.uniform(kind) < config.cutmix_share,
        lambda: cutmix(images, targets, box),
        lambda: mixup(images, targets, share),
    )


def erase(images: Images, key: Array, positions: UInt[Array, " batch"], chance: float) -> Images:
    """Put normal noise into a random rectangle of some images, drawn by position (timm's RandomErasing, `pixel`)."""
    if chance == 0:
        return images
    height, width = images.shape[1:3]

    def one(image: Float[Array, "height width channels"], position: Int[Array, ""]) -> Array:
        whether, boxes, noise = jax.random.split(jax.random.fold_in(key, position), 3)
        inside = erased_box(jax.random.uniform(boxes, (_TRIES, 4)), height, width)
        inside &= jax.random.uniform(whether) < chance
        return jnp.where(inside[:, :, None], jax.random.normal(noise, image.shape, image.dtype), image)

    return jax.vmap(one)(images, positions)


def erased_box(uniforms: Float[Array, "tries 4"], height: int, width: int) -> Bool[Array, "height width"]:
    """Mark the first rectangle of those drawn that is smaller than the image, or nothing where none is.

    Four uniforms make one: area, height to width (log-uniform), top, left.
    """
    # All tries are computed at once, (tries,) each: a compiled program cannot draw until one fits, as timm does.
    area, aspect, top, left = uniforms.T
    low, high = ERASED_AREA
    area = height * width * (low + (high - low) * area)
    aspect = jnp.exp((1 - 2 * aspect) * jnp.log(ERASED_ASPECT))
    tall, broad = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (tall < height) & (broad < width)
    first = jnp.argmax(fits)  # 0 where none fits, which the last line mends
    # timm draws from 0 .. size - side, both included.
    top = jnp.floor(top * (height - tall + 1))[first]
    left = jnp.floor(left * (width - broad + 1))[first]
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    inside = (rows >= top) & (rows < top + tall[first]) & (columns >= left) & (columns < left + broad[first])
    return inside & fits[first]
