"""How close is close enough: each bound once, with its reason.

Relative error is max |a - b| / max |b| over a tensor. Float64 shows a difference in meaning, which rounding cannot
hide there; float32 shows that nothing is computed in less than it says. No bound is widened to make a check pass.
"""

from dataclasses import dataclass
from typing import Literal

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
    "forward": Bound(1e-13, 5e-6, "roundings of all stages before it, carried along by the residual stream"),
    "gradient": Bound(1e-12, 1e-5, "roundings of the forward and the backward pass"),
    "training": Bound(1e-12, 1e-5, "20 updates: each adds the rounding of its gradient, times a small step"),
    "float32": Bound(1e-6, 1e-6, "float32 at either precision: the loss of a bfloat16 model"),
    "float16 file": Bound(0.01, 0.01, "every weight rounded to float16 (11 bits): 2^-11 each, ten times that in sum"),
    "bfloat16 file": Bound(0.08, 0.08, "every weight rounded to bfloat16 (8 bits): 2^-8 each, twenty times in sum"),
    "bfloat16": Bound(2**-7, 2**-7, "a result rounded to bfloat16 twice (8 bits of precision, 2^-8 each)"),
}
Kind = Literal[
    "exact",
    "table",
    "stage",
    "product",
    "forward",
    "gradient",
    "training",
    "float32",
    "float16 file",
    "bfloat16 file",
    "bfloat16",
]
