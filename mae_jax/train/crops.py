"""Crops cut on the device, from the same boxes as those on the host.

Resampling is separable: two products with matrices of weights, one row for each pixel of the crop, are Pillow's
antialiased bicubic (its `ImagingResample`: Keys' kernel with a = -0.5, widened when it shrinks, cut off at the crop's
edges, rounded to bytes between the two passes). `jax.image.scale_and_translate` would read beyond the crop.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from mae_jax.cubic import keys_cubic

# Images that are cropped at a time: the rows between the two passes are float32, larger than the batch itself.
_AT_ONCE = 64


def crop_images(
    images: UInt8[Array | np.ndarray, "batch height width channels"],
    crops: Float[Array | np.ndarray, "batch 5"],
    image_hw: tuple[int, int],
) -> UInt8[Array, "batch rows columns channels"]:
    """Cut, resize to `image_hw` and flip: a crop is left, top, right, bottom in pixels, and 1 to flip it, else 0."""

    def one(
        pair: tuple[UInt8[Array, "height width channels"], Float[Array, "5"]],
    ) -> UInt8[Array, "rows columns channels"]:
        image, (left, top, right, bottom, flip) = pair
        across = box_weights(left, right, image.shape[1], image_hw[1])
        across = jnp.where(flip > 0, across[::-1], across)
        down = box_weights(top, bottom, image.shape[0], image_hw[0])
        # Float32 products: TPUs and GPUs would round bytes to bfloat16 or TF32.
        rows = jnp.einsum("ow,hwc->hoc", across, image.astype(jnp.float32), precision="highest")
        return _bytes(jnp.einsum("oh,hwc->owc", down, _bytes(rows).astype(jnp.float32), precision="highest"))

    return jax.lax.map(one, (jnp.asarray(images), jnp.asarray(crops, jnp.float32)), batch_size=_AT_ONCE)


def box_weights(start: Float[Array, ""], stop: Float[Array, ""], size: int, out: int) -> Float[Array, "out size"]:
    """Compute the bicubic weights of `size` pixels in each of the `out` that `start` to `stop` is resized to."""
    scale = (stop - start) / out
    widened = jnp.maximum(scale, 1)
    # Of an image that shrinks the kernel is widened, so that every pixel of it counts (antialiasing).
    centres = start + (jnp.arange(out) + 0.5) * scale
    pixels = jnp.arange(size)
    x = jnp.abs(pixels + 0.5 - centres[:, None]) / widened
    # Pixels beyond the box do not count. Edges within a thousandth of a whole pixel are rounding of the box.
    inside = (pixels >= jnp.floor(start + 1e-3)) & (pixels < jnp.ceil(stop - 1e-3))
    weights = jnp.where(inside, keys_cubic(x, -0.5), 0)
    return weights / weights.sum(axis=1, keepdims=True)


def _bytes(values: Float[Array, "a b c"]) -> UInt8[Array, "a b c"]:
    """Round to the nearest byte, halves up, as Pillow does."""
    return jnp.clip(jnp.floor(values + 0.5), 0, 255).astype(jnp.uint8)
