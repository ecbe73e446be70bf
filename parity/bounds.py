"""How close is close enough: each bound once, with its reason; and a pair of tensors against its bound.

Relative error is max |a - b| / max |b| over a tensor. Float64 shows a difference in meaning, which rounding cannot
hide there; float32 shows that nothing is computed in less than it claims. No bound is widened to make a check pass,
and none is more than ten times the largest error that is seen without a mistake, or one rounding where that is larger.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from mae_jax.port import compare as tensors
from mae_jax.port.compare import Comparison

Precision = Literal["float64", "float32"]

ROUNDING = {"float64": 2.0**-52, "float32": 2.0**-23}  # from one number to the next


@dataclass(frozen=True)
class Bound:
    """The largest relative error allowed at each precision, the largest seen without a mistake, and the reason.

    seen_float64, seen_float32: over the small models at five seeds and ViT-B/16, on a CPU.
    """

    float64: float
    float32: float
    seen_float64: float
    seen_float32: float
    reason: str

    def at(self, precision: Precision) -> float:
        """Return the bound at a precision."""
        return self.float64 if precision == "float64" else self.float32

    def seen(self, precision: Precision) -> float:
        """Return the largest error seen at a precision."""
        return self.seen_float64 if precision == "float64" else self.seen_float32


BOUNDS = {
    "exact": Bound(0.0, 0.0, 0.0, 0.0, "values are moved, counted or compared, never computed"),
    "table": Bound(2.0**-23, 2.0**-23, 0.0, 0.0, "computed in float64 and stored as float32: one rounding"),
    "stage": Bound(3e-14, 1e-6, 6.7e-15, 7.5e-7, "a few roundings of one stage fed with the same input"),
    "product": Bound(3e-14, 2e-6, 3e-15, 1.3e-6, "one product with no residual beside it, of up to 512 terms"),
    "normal": Bound(1e-12, 1e-5, 1e-13, 4.6e-6, "the inverse of erf: its slope multiplies the rounding of a uniform"),
    "forward": Bound(3e-14, 5e-6, 3e-15, 1.2e-6, "roundings of all stages before it, carried by the residual stream"),
    "gradient": Bound(2.5e-14, 1e-5, 3.3e-15, 2e-6, "roundings of the forward and the backward pass"),
    "training": Bound(1e-12, 1e-5, 1.5e-13, 4.7e-6, "up to 20 updates: each adds the rounding of its gradient"),
    # bfloat16 models, on inputs whose rounding is known: what is left does not depend on the precision beside them.
    "float32": Bound(1e-6, 1e-6, 2.9e-7, 2.9e-7, "float32 at either precision: sums in a bfloat16 model"),
    "cancelled": Bound(2e-5, 2e-5, 5.8e-6, 5.8e-6, "float32, less a mean of 64 times the deviation"),
    "alike": Bound(4e-3, 4e-3, 4.9e-4, 4.9e-4, "share of values that round to another bfloat16"),
    "bfloat16": Bound(2**-5, 2**-5, 1.6e-2, 1.6e-2, "a pass whose products are rounded to bfloat16, 2^-8 each"),
}
Kind = Literal[
    "exact",
    "table",
    "stage",
    "product",
    "normal",
    "forward",
    "gradient",
    "training",
    "float32",
    "cancelled",
    "alike",
    "bfloat16",
]
# What is computed in the precision of the comparison, and has to come in it.
COMPUTED = ("stage", "product", "normal", "forward", "gradient", "training")

# An accelerator's float32, by platform and kind, once it is measured there. Until then the CPU's bounds are tried.
ACCELERATORS: dict[str, dict[Kind, float]] = {"gpu": {}, "tpu": {}}


@dataclass(frozen=True)
class Pair:
    """A tensor of this project and the reference's, and how closely they have to agree.

    dtype: of this project's, where it has to be another than the precision of the comparison.
    """

    stage: str
    tensor: str
    ours: Any
    theirs: Any
    kind: Kind
    dtype: str | None = None


Pairs = Iterator[Pair]


def as_numpy(values: Any) -> np.ndarray:
    """Convert an array of JAX, PyTorch or NumPy, or a number."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def compare(pair: Pair, precision: Precision, platform: str = "cpu") -> Comparison:
    """Compare a pair; a result in another precision than claimed is a fault even where its values agree.

    platform: where this project's side was computed.
    """
    ours, theirs = as_numpy(pair.ours), as_numpy(pair.theirs)
    wanted = pair.dtype or (precision if pair.kind in COMPUTED else None)
    fault = f"computed in {ours.dtype}" if wanted and ours.dtype != wanted else ""
    bound = BOUNDS[pair.kind].at(precision)
    if precision == "float32":
        bound = ACCELERATORS.get(platform, {}).get(pair.kind, bound)
    result = tensors.compare(pair.tensor, ours, theirs, bound, fault=fault, stage=pair.stage)
    return replace(result, kind=pair.kind)
