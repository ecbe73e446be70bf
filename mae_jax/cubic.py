"""Keys' cubic kernel, which all bicubic resampling here shares: images on the host, on the device, and positions."""

from typing import Any


def keys_cubic(x: Any, a: float) -> Any:
    """Return the kernel's weight at each distance `x` >= 0, for arrays of NumPy and of JAX.

    `a` is the slope at distance 1: -0.5 in Pillow, -0.75 in PyTorch and OpenCV. From distance 2 on a weight is 0.
    Evaluated in the order of Pillow's `bicubic_filter`, so that float64 gives the same bits.
    Source: Keys 1981, "Cubic convolution interpolation for digital image processing", equation 15.
    """
    xp = x.__array_namespace__()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return xp.where(x < 1, near, xp.where(x < 2, far, 0.0))
