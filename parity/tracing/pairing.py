"""Which value of one model is which of another: an alignment of two sequences, with a table of names where it is given.

Two models rarely have the same modules: what one computes in a module of its own the other computes inline. Values are
therefore aligned as two sequences in the order data flows, so that pairs never cross and what is left over has no
partner. Agreement of values is the strongest sign of a pair, weights of the same sizes the next.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mae_jax.errors import StatedError
from parity.tracing.captures import Array, Arrays, Gradients, Run, Value, merges

Names = Mapping[str, str]

# Where Flax has another word for what PyTorch calls so.
_WORDS = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}


class Layouts:
    """The order of axes on both sides: `NCHW->NHWC` says that PyTorch's NCHW is NHWC in Flax.

    A layout holds for values with as many axes as it has letters; several are separated by spaces. They are given for
    all values, or by PyTorch's names: the longest name that a value's name begins with counts, `*` where none does.
    The inputs go by the name `input`.

    Raises:
      StatedError: a layout does not have the same letters on both sides.
    """

    def __init__(self, given: str | Mapping[str, str]) -> None:
        by_name = {"*": given} if isinstance(given, str) else given
        self._orders = {name: dict(map(self._read, text.split())) for name, text in by_name.items()}

    @staticmethod
    def _read(text: str) -> tuple[int, tuple[int, ...]]:
        theirs, arrow, ours = text.partition("->")
        if not arrow or sorted(theirs) != sorted(ours) or len(set(ours)) != len(ours):
            message = f"layouts: {text!r} is not like 'NCHW->NHWC', the same letters in PyTorch's order and in Flax's"
            raise StatedError(message, field="layouts")
        return len(theirs), tuple(theirs.index(letter) for letter in ours)

    def _order(self, name: str, axes: int) -> tuple[int, ...]:
        fitting = [key for key in self._orders if key == name or re.match(rf"{re.escape(key)}[.\[#]", name)]
        key = max(fitting, key=len, default="*")
        return self._orders.get(key, {}).get(axes, tuple(range(axes)))

    def to_ours(self, name: str, theirs: Array) -> Array:
        return np.transpose(theirs, self._order(name, theirs.ndim))

    def to_theirs(self, name: str, ours: Array) -> Array:
        return np.transpose(ours, np.argsort(self._order(name, ours.ndim)))

    def of(self, run: Run) -> Run:
        """Return a run of PyTorch's with the axes of its values, and of the gradients there, in Flax's order."""

        def value(one: Value) -> Value:
            source = None if one.source is None else self.to_ours(one.name, one.source)
            return replace(one, value=self.to_ours(one.name, one.value), source=source)

        def backward(weights: Arrays) -> Gradients:
            found = run.backward({name: self.to_theirs(name, values) for name, values in weights.items()})
            values = {name: self.to_ours(name, values) for name, values in found.values.items()}
            inputs = {place: self.to_ours("input", values) for place, values in found.inputs.items()}
            return Gradients(values, found.parameters, inputs)

        return Run(tuple(map(value, run.values)), run.state, backward)


@dataclass(frozen=True, eq=False)
class _Signs:
    """What a value can be recognised by."""

    value: Value
    sizes: Counter[int]  # of the parameters that its module itself has
    composite: bool  # its module has called others
    scope: str | None  # the innermost module around it that the table names, by our name

    @cached_property
    def fingerprint(self) -> tuple[float, float]:
        values = self.value.value.astype(np.float64).ravel()
        values = np.where(np.isfinite(values), values, 0.0)
        direction = np.random.default_rng(values.size).standard_normal(values.size)
        return float(np.linalg.norm(values)), float(values @ direction)

    @cached_property
    def words(self) -> set[str]:
        return set(re.findall(r"[a-z]+|\d+", self.value.name.lower()))

    @cached_property
    def last(self) -> str:
        return re.split(r"[./]", self.value.module.lower())[-1]


def _agree(ours: _Signs, theirs: _Signs) -> bool:
    """Return whether two values agree as far as their fingerprints tell, far beyond their rounding."""
    error = 1e-9 if ours.value.value.dtype == theirs.value.value.dtype == np.float64 else 1e-4
    norm = theirs.fingerprint[0]
    return all(abs(a - b) <= error * norm for a, b in zip(ours.fingerprint, theirs.fingerprint, strict=True))


def _closeness(ours: _Signs, theirs: _Signs) -> float:
    """Return how likely two values are the same; 0 where they cannot be paired."""
    if ours.scope != theirs.scope:
        return 0.0
    same_shape = merges(ours.value.value.shape, theirs.value.value.shape)
    agree = same_shape and _agree(ours, theirs)
    common, either = ours.sizes & theirs.sizes, ours.sizes | theirs.sizes
    alike = sum(size * n for size, n in common.items()) / (sum(size * n for size, n in either.items()) or 1)
    related = alike > 0.4 or (
        same_shape
        and (not ours.sizes or not theirs.sizes)
        and (ours.last == theirs.last or (ours.composite and theirs.composite))
    )
    if not (agree or related):
        return 0.0
    similar = len(ours.words & theirs.words) / len(ours.words | theirs.words)
    if not related:
        # Where nothing better pairs them: a dropout that is off returns what the layer before it returned.
        return 0.1 + similar
    return 8.0 * agree + 4.0 * alike + same_shape + 0.5 * (ours.composite == theirs.composite) + similar


def pair_values(
    ours: Sequence[Value], theirs: Sequence[Value], our_sizes: Arrays, their_sizes: Arrays, names: Names
) -> list[tuple[Value, Value]]:
    """Return the pairs in the order data flows.

    What the whole models return is paired by its place, what the table names by its name, the rest by the best
    alignment; what is inside a named module is paired with what is inside its partner.
    """
    by_name = {value.name: value for value in theirs}
    named = {value.name: names.get(value.name) or _renamed(value, names) for value in ours}
    outputs = [[value.name for value in side if not value.module] for side in (ours, theirs)]
    fixed = dict(zip(*outputs, strict=False))
    fixed |= {name: partner for name, partner in named.items() if partner in by_name}
    left = {*fixed, *outputs[0]}, {*fixed.values(), *outputs[1]}
    ends = {name: name for name in names}, {end: start for start, end in names.items()}
    a, b = (
        [sign for sign in _signs(side, sizes, end) if sign.value.name not in out]
        for side, sizes, end, out in zip((ours, theirs), (our_sizes, their_sizes), ends, left, strict=True)
    )
    found = dict(fixed)
    while pairs := _align(a, b):
        found |= {mine.value.name: other.value.name for mine, other in pairs}
        # Branches that the two compute in another order are left, and their layers are known by their weights.
        a, b = (
            [sign for sign in side if sign.sizes and sign not in out]
            for side, out in zip((a, b), zip(*pairs, strict=True), strict=True)
        )
    return [(value, by_name[found[value.name]]) for value in ours if value.name in found]


def _renamed(value: Value, names: Names) -> str:
    """Return a value's partner where the table names its module and not each call or output of it."""
    return names[value.module] + value.name.removeprefix(value.module) if value.module in names else ""


def _signs(values: Sequence[Value], parameters: Arrays, ends: Mapping[str, str]) -> Iterator[_Signs]:
    sizes: dict[str, Counter[int]] = {}
    for name, parameter in parameters.items():
        sizes.setdefault(module_of(name), Counter())[parameter.size] += 1
    parents = {module_of(value.module) for value in values if value.module}
    for value in values:
        around = [end for end in ends if re.match(rf"{re.escape(end)}[./]", value.name)]
        scope = ends[max(around, key=len)] if around else None
        yield _Signs(value, sizes.get(value.module, Counter()), value.module in parents, scope)


def _align(ours: list[_Signs], theirs: list[_Signs]) -> list[tuple[_Signs, _Signs]]:
    """Return the pairs that do not cross and have the largest closeness in sum."""
    best = np.zeros((len(ours) + 1, len(theirs) + 1))
    close = np.array([[_closeness(a, b) for b in theirs] for a in ours]).reshape(len(ours), len(theirs))
    for i, j in np.ndindex(close.shape):
        best[i + 1, j + 1] = max(best[i, j + 1], best[i + 1, j], best[i, j] + close[i, j])
    pairs, (i, j) = [], close.shape
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((ours[i], theirs[j]))
    return pairs[::-1]


def module_of(name: str) -> str:
    """Return the module's path of a parameter's name, on either side."""
    return re.sub(r"(^|[./])[^./]*$", "", name)


def pair_parameters(
    modules: Collection[tuple[str, str]], ours: Arrays, theirs: Arrays, names: Names
) -> dict[str, tuple[str, Callable[[Array], Array]]]:
    """Return for our parameters their name in PyTorch, and what arranges PyTorch's as ours.

    Those of paired modules go by what they are: kernel and weight with axes turned, scale and weight, embedding and
    weight, mean and running_mean, and what has the same name. A pair has the same shape; the rest is not guessed.
    """
    partners = {a: b for a, b in names.items() if a in ours and b in theirs}
    for a, b in modules:
        inside = {re.split(r"[./]", name)[-1]: name for name in theirs if module_of(name) == b}
        for name in ours:
            kind = re.split(r"[./]", name)[-1]
            partner = inside.get(_WORDS.get(kind, kind), inside.get(kind))
            if module_of(name) == a and partner is not None and partner not in partners.values():
                partners.setdefault(name, partner)
    found = {}
    for name, partner in partners.items():
        arrange = _arranged(name, ours[name].shape)
        if merges(arrange(theirs[partner]).shape, ours[name].shape):
            found[name] = partner, arrange
    return found


def _arranged(name: str, shape: tuple[int, ...]) -> Callable[[Array], Array]:
    """Return what turns PyTorch's (out, in, ...) into Flax's (..., in, out) for a kernel, and leaves the rest."""

    def kernel(theirs: Array) -> Array:
        turned = np.moveaxis(theirs, (0, 1), (-1, -2)) if theirs.ndim > 1 else theirs
        # A DenseGeneral has heads and width as two axes, which PyTorch's Linear has as one.
        return turned.reshape(shape) if theirs.ndim == 2 and theirs.size == math.prod(shape) else turned

    return kernel if re.split(r"[./]", name)[-1] == "kernel" else lambda theirs: theirs
