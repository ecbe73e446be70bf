"""Where two models part: pairs of arrays against their bounds, and the report of them all."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from mae_jax.port import compare as tensors
from mae_jax.port.compare import Comparison
from parity.bounds import BOUNDS, Kind, Precision
from parity.report import COLUMNS, line, rows
from parity.tracing.captures import Array, floating, merges


@dataclass(frozen=True)
class Report:
    """What a trace found.

    results: the stage is Flax's name, the tensor PyTorch's; values in the order data flows, then gradients backwards.
    alone: values and parameters without a partner, of Flax and of PyTorch.
    notes: what else has to be known, a sentence each.
    place: where the first departure arises.
    """

    results: Mapping[Precision, tuple[Comparison, ...]]
    alone: tuple[tuple[str, ...], tuple[str, ...]]
    notes: tuple[str, ...]
    place: str = ""

    @property
    def first_departure(self) -> Comparison | None:
        """Return the first result beyond its bound, at the first precision where there is one."""
        return next((one for results in self.results.values() for one in results if not one.passed), None)

    @property
    def precision(self) -> Precision | None:
        """Return the precision of the first departure."""
        return next((at for at, results in self.results.items() if not all(one.passed for one in results)), None)

    @property
    def passed(self) -> bool:
        return all(self.results.values()) and self.first_departure is None

    @property
    def verdict(self) -> str:
        """State in a few sentences how it ended."""
        first = self.first_departure
        if first is None:
            count = len(next(iter(self.results.values())))
            return (
                f"All {count} pairs agree, in {' and in '.join(self.results)}." if count else "Nothing could be paired."
            )
        reason = first.fault or f"relative error {first.max_rel:.1e}, bound {first.bound:.0e}"
        agreed = (
            "In float64 they agree: it is a matter of precision." if self.precision != next(iter(self.results)) else ""
        )
        where = f"They part in {self.precision} at {first.stage!r}, in PyTorch {first.tensor!r}: {reason}."
        return " ".join(filter(None, (where, self.place, agreed)))

    @property
    def table(self) -> str:
        """Return a row for each pair, at each precision; then what is alone, the notes, and the verdict."""
        lines = []
        for precision, results in self.results.items():
            lines += [precision, line(COLUMNS)]
            groups = [list(group) for _, group in groupby(results, key=lambda one: one.stage)]
            for (stage, *numbers, verdict), group in zip(rows(list(results)), groups, strict=True):
                short = stage if len(stage) < 32 else f"...{stage[-28:]}"
                lines.append(line((short, *numbers, f"ok: {group[0].tensor}" if verdict == "ok" else verdict)))
            lines.append("")
        for library, names in zip(("Flax", "PyTorch"), self.alone, strict=True):
            lines += [f"Without a partner, of {library}: {', '.join(names)}"] if names else []
        return "\n".join([*lines, *self.notes, self.verdict])

    def __str__(self) -> str:
        return self.table


def compared(
    stage: str,
    ours: Array,
    tensor: str,
    theirs: Array,
    kind: Kind,
    precision: Precision | None,
    *,
    fault: str = "",
    scale: float = 0.0,
    merged: bool = True,
) -> Comparison:
    """Compare two arrays relative to the larger of PyTorch's largest value and the scale; integers exactly.

    Neighbouring axes may be merged on one side, unless `merged` is false. The precision is the one in which both have
    to be computed; without it, float64's bound holds for any.
    """
    bound = BOUNDS[kind if floating(theirs) else "exact"].at(precision or "float64")
    if merged and merges(ours.shape, theirs.shape):
        theirs = theirs.reshape(ours.shape)
    if ours.shape != theirs.shape:
        hint = ", the same in another order: see layouts" if sorted(ours.shape) == sorted(theirs.shape) else ""
        fault = f"shape {ours.shape} in Flax, {theirs.shape} in PyTorch{hint}"
        return Comparison(tensor, math.nan, math.nan, bound, fault, stage)
    if not ours.size:
        return Comparison(tensor, 0.0, 0.0, bound, fault, stage)
    sides = {"Flax": ours, "PyTorch": theirs}
    low = [
        f"computed in {a.dtype} by {name}"
        for name, a in sides.items()
        if precision and floating(a) and a.dtype != precision
    ]
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    same = np.isinf(ours) & (ours == theirs)  # such as a mask of attention
    ours, theirs = np.where(same, 0.0, ours), np.where(same, 0.0, theirs)
    bad = [
        f"{not_finite(a)} in {name}" for name, a in (("Flax", ours), ("PyTorch", theirs)) if not np.isfinite(a).all()
    ]
    one = tensors.compare(tensor, ours, theirs, bound, fault=fault or ", ".join(bad + low), stage=stage)
    scale = max(scale, largest(theirs)) or 1.0
    return replace(one, max_rel=one.max_abs / scale)


def largest(values: Array) -> float:
    """Return the largest absolute value; 0 of none."""
    return float(np.abs(values.astype(np.float64)).max(initial=0.0))


def not_finite(values: Array) -> str:
    """Return the first value that is not finite, and where it is."""
    place = tuple(map(int, np.argwhere(~np.isfinite(values))[0]))
    return f"{values[place]} at {place}"
