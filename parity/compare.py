"""One tensor of ours against one of theirs."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from parity.tolerances import BOUNDS, Kind, Precision


@dataclass(frozen=True)
class Pair:
    """A tensor of this project and the reference's, and how closely they have to agree."""

    stage: str
    tensor: str
    ours: Any
    theirs: Any
    kind: Kind


@dataclass(frozen=True)
class Result:
    """How far apart a pair is; `fault` says what is wrong with it beside its values, if anything is."""

    stage: str
    tensor: str
    max_abs: float
    max_rel: float
    bound: float
    fault: str = ""

    @property
    def passed(self) -> bool:
        return not self.fault and self.max_rel <= self.bound  # false for nan

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def as_numpy(values: Any) -> np.ndarray:
    """An array of JAX, PyTorch or NumPy, or a number."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def compare(pair: Pair, precision: Precision) -> Result:
    """Relative error max |a - b| / max |b|; where the reference is all zero, the absolute one.

    A result in another precision than claimed is a fault even where its values agree.
    """
    ours, theirs = as_numpy(pair.ours), as_numpy(pair.theirs)
    bound = BOUNDS[pair.kind].at(precision)
    fault = ""
    if ours.shape != theirs.shape:
        fault = f"shape {ours.shape}, reference {theirs.shape}"
    elif pair.kind in ("stage", "product", "forward", "gradient") and ours.dtype != precision:
        fault = f"computed in {ours.dtype}"
    if ours.shape != theirs.shape or theirs.size == 0:
        return Result(pair.stage, pair.tensor, math.nan, math.nan, bound, fault or "nothing to compare")
    theirs = theirs.astype(np.float64)
    max_abs = float(np.abs(ours.astype(np.float64) - theirs).max())
    max_rel = max_abs / (float(np.abs(theirs).max()) or 1.0)
    return Result(pair.stage, pair.tensor, max_abs, max_rel, bound, fault)


def worst(results: list[Result]) -> Result:
    """The result that is furthest beyond, or else nearest to, its bound."""

    def distance(result: Result) -> float:
        if result.fault or math.isnan(result.max_rel):
            return math.inf
        return result.max_rel / result.bound if result.bound else (math.inf if result.max_rel else 0.0)

    return max(results, key=distance)
