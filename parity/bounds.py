"""How close is close enough: each bound once, with its reason; and a pair of tensors against its bound.

Relative error is max |a - b| / max |b| over a tensor. Float64 shows a difference in meaning, which rounding cannot
hide there; float32 shows that nothing is computed in less than it claims. No bound is widened to make a check pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from mae_jax.port import compare as tensors
from mae_jax.port.compare import Comparison
from mae_jax.port.verify import BOUNDS as FILE_BOUNDS

Precision = Literal["float64", "float32"]


@dataclass(frozen=True)
class Bound:
    """The largest relative error allowed at each precision, and why."""

    float64: float
    float32: float
    reason: str

    def at(self, precision: Precision) -> float:
        return self.float64 if precision == "float64" else self.float32


BOUNDS = {
    "exact": Bound(0.0, 0.0, "values are moved, counted or compared, never computed"),
    "table": Bound(2.0**-23, 2.0**-23, "computed in float64 and stored as float32: either side of one rounding"),
    "stage": Bound(1e-13, 1e-6, "a few roundings of one stage fed with the same input"),
    "product": Bound(1e-13, 2e-6, "one product with no residual beside it: of 512 terms XLA's is 1.3e-6 from exact"),
    "normal": Bound(1e-11, 1e-5, "XLA's inverse of erf: in float32 5.8e-6 from exact at the worst of all uniforms"),
    "forward": Bound(
        1e-13, FILE_BOUNDS["float32"], "roundings of all stages before it, carried along by the residual stream"
    ),
    "gradient": Bound(1e-12, 1e-5, "roundings of the forward and the backward pass"),
    "training": Bound(1e-12, 1e-5, "20 updates: each adds the rounding of its gradient, times a small step"),
    "float32": Bound(1e-6, 1e-6, "float32 at either precision: the loss of a bfloat16 model"),
    "bfloat16": Bound(2**-7, 2**-7, "a result rounded to bfloat16 twice (8 bits of precision, 2^-8 each)"),
}
Kind = Literal["exact", "table", "stage", "product", "normal", "forward", "gradient", "training", "float32", "bfloat16"]


@dataclass(frozen=True)
class Pair:
    """A tensor of this project and the reference's, and how closely they have to agree."""

    stage: str
    tensor: str
    ours: Any
    theirs: Any
    kind: Kind


Pairs = Iterator[Pair]


def as_numpy(values: Any) -> np.ndarray:
    """Convert an array of JAX, PyTorch or NumPy, or a number."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def compare(pair: Pair, precision: Precision) -> Comparison:
    """Compare a pair; a result in another precision than claimed is a fault even where its values agree."""
    ours, theirs = as_numpy(pair.ours), as_numpy(pair.theirs)
    computed = pair.kind in ("stage", "product", "forward", "gradient")
    fault = f"computed in {ours.dtype}" if computed and ours.dtype != precision else ""
    bound = BOUNDS[pair.kind].at(precision)
    return tensors.compare(pair.tensor, ours, theirs, bound, fault=fault, stage=pair.stage)
