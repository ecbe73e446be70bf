"""One tensor of ours against what it should be: how far apart they are, and whether that is close enough."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Comparison:
    """How far apart two tensors are: max |a - b|, and that over max |b|.

    fault: what is wrong beside the values, if anything is.
    stage: the part of a whole that the tensor belongs to. kind: of bound, where there are several.
    """

    tensor: str
    max_abs: float
    max_rel: float
    bound: float
    fault: str = ""
    stage: str = ""
    kind: str = ""

    @property
    def passed(self) -> bool:
        """Return whether they are close enough; nan is not."""
        return not self.fault and self.max_rel <= self.bound

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def compare(
    tensor: str, ours: np.ndarray, expected: np.ndarray, bound: float, *, fault: str = "", stage: str = ""
) -> Comparison:
    """Compare two tensors in float64; where all that is expected is zero, the relative error is the absolute one."""
    if ours.shape != expected.shape:
        fault = f"shape {ours.shape}, reference {expected.shape}"
    if ours.shape != expected.shape or expected.size == 0:
        return Comparison(tensor, math.nan, math.nan, bound, fault or "nothing to compare", stage)
    expected = expected.astype(np.float64)
    max_abs = float(np.abs(ours.astype(np.float64) - expected).max())
    max_rel = max_abs / (float(np.abs(expected).max()) or 1.0)
    return Comparison(tensor, max_abs, max_rel, bound, fault, stage)


def worst(comparisons: Sequence[Comparison]) -> Comparison:
    """Return the comparison that is furthest beyond, or else nearest to, its bound."""

    def distance(one: Comparison) -> float:
        if one.fault or math.isnan(one.max_rel):
            return math.inf
        return one.max_rel / one.bound if one.bound else (math.inf if one.max_rel else 0.0)

    return max(comparisons, key=distance)
