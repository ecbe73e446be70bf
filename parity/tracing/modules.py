"""Any Flax module against any PyTorch module: at which layer do the two part?

Both run on the same inputs and weights in float64, which shows a difference in meaning, and in float32, which shows
what is computed in less. What their modules return is paired and compared in the order data flows; then the gradients
of a fixed random sum of the outputs, from there back to the inputs.
"""

import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from mae_jax.errors import StatedError, shown
from mae_jax.port.compare import Comparison
from parity.bounds import Kind, Precision
from parity.tracing.capture_flax import Flax
from parity.tracing.capture_torch import Torch
from parity.tracing.captures import Arrays, Run, floating, merges
from parity.tracing.departures import Report, compared, largest, not_finite
from parity.tracing.pairing import Layouts, Names, module_of, pair_parameters, pair_values

Parameters = Mapping[str, tuple[str, Any]]  # ours: PyTorch's, and what arranges PyTorch's as ours


def trace(
    module: Any,
    variables: Any,
    torch_module: torch.nn.Module,
    inputs: tuple[Any, ...],
    torch_inputs: tuple[Any, ...] | None = None,
    *,
    names: Names | None = None,
    layouts: str | Mapping[str, str] = "",
    kwargs: Mapping[str, Any] | None = None,
    torch_kwargs: Mapping[str, Any] | None = None,
    method: str = "__call__",
    precisions: tuple[Precision, ...] = ("float64", "float32"),
    seed: int = 0,
) -> Report:
    """Compare a Flax module with a PyTorch module, layer by layer, and change neither.

    Args:
      module: of linen, or of NNX.
      variables: of a linen module, as its `init` returns them; None for an NNX module.
      torch_module: in the mode in which it is to run. A copy of it runs on the CPU, with the hooks that it has.
      inputs: the positional arguments. Floating-point arrays are cast to each precision, all others left.
      torch_inputs: PyTorch's, where they differ (in layout); the same by default.
      names: the partners that order and shape do not give, Flax's name first (`{"encoder/block_0": "blocks.0"}`), of
        modules, of single values (`relu#2`, `attn[1]`) or of parameters. What is inside a pair stays inside.
      layouts: the order of axes, PyTorch's first (`"NCHW->NHWC"`), of all values or by PyTorch's names (see `Layouts`).
      kwargs: the keyword arguments of Flax (`{"train": True}`).
      torch_kwargs: those of PyTorch.
      method: of the Flax module.
      precisions: in this order; float32 alone for a model that can compute in nothing else.
      seed: of the random sum of the outputs, and of what is random in the models.

    Raises:
      StatedError: an argument cannot be used, or one of the models raised.
    """
    if not precisions or not {*precisions} <= {"float64", "float32"}:
        message = f"precisions are {shown(precisions)}: give 'float64', 'float32' or both, in a tuple"
        raise StatedError(message, field="precisions")
    for field, given in (("inputs", inputs), ("torch_inputs", torch_inputs)):
        if not isinstance(given, tuple | list | None):
            raise StatedError(f"{field} is {shown(given)}: give a tuple of the arguments", field=field)
    if not isinstance(torch_module, torch.nn.Module):
        raise StatedError(f"torch_module is {shown(torch_module)}, not a module of PyTorch", field="torch_module")
    theirs = Torch(torch_module, tuple(inputs if torch_inputs is None else torch_inputs), torch_kwargs or {})
    ours = Flax(module, variables, tuple(inputs), kwargs or {}, method)
    return _Trace(ours, theirs, dict(names or {}), Layouts(layouts), precisions, seed).report()


class _Trace:
    """Both sides' runs, and their pairs."""

    def __init__(
        self,
        ours: Flax,
        theirs: Torch,
        names: Names,
        layouts: Layouts,
        precisions: tuple[Precision, ...],
        seed: int,
    ) -> None:
        self.seed = seed
        self.sides: tuple[Flax | Torch, Flax | Torch] = ours, theirs
        self.runs: dict[Precision, tuple[Run, Run]] = {
            precision: (ours.run(precision, seed), layouts.of(theirs.run(precision, seed))) for precision in precisions
        }
        self.first = first, second = self.runs[precisions[0]]
        self._check(names)
        self.pairs = pair_values(first.values, second.values, ours.parameters, theirs.parameters, names)
        modules = dict.fromkeys((a.module, b.module) for a, b in self.pairs if b.module not in theirs.transposed)
        self.parameters = pair_parameters(modules, ours.parameters, theirs.parameters, names)
        self.state = pair_parameters(modules, ours.state, theirs.state, names)
        # What a side's second run does not repeat.
        again = ours.run(precisions[0], seed + 1), layouts.of(theirs.run(precisions[0], seed + 1))
        self.random = [_unlike(*runs) for runs in zip(self.first, again, strict=True)]

    def _check(self, names: Names) -> None:
        for side, run, given in zip(self.sides, self.first, (names, names.values()), strict=True):
            known = [*(value.name for value in run.values), *side.parameters, *side.state]
            for name in given:
                if not any(re.match(rf"{re.escape(name)}($|[./#\[])", one) for one in known):
                    message = f"names: {side.library}'s model has no {name!r}; it has {', '.join(known)}"
                    raise StatedError(message, field="names")

    def report(self) -> Report:
        weights = self._weights()
        results = {
            precision: (*self._values(precision), *(self._gradients(precision, *weights) if weights[0] else ()))
            for precision in self.runs
        }
        notes = list(self._notes())
        if not weights[0]:
            notes.append("No outputs are of the same shape: gradients are not compared.")
        found = Report(results, self._alone(), tuple(notes))
        first, precision = found.first_departure, found.precision
        return replace(found, place=self._place(precision, first)) if first and precision else found

    def _values(self, precision: Precision) -> Iterator[Comparison]:
        """Compare what each pair of modules returns, and their running statistics after the last of it."""
        ours, theirs = self.runs[precision]
        a, b = ({value.name: value.value for value in run.values} for run in (ours, theirs))
        last = {mine.module: mine.name for mine, _ in self.pairs}
        for mine, other in self.pairs:
            random = [
                side.library
                for side, value, names in zip(self.sides, (mine, other), self.random, strict=True)
                if value.name in names
            ]
            fault = f"random in {' and '.join(random)}" if random else ""
            values, inner = (a[mine.name], other.name, b[other.name]), bool(mine.module or other.module)
            yield compared(mine.name, *values, "forward", precision, fault=fault, merged=inner)
            if last[mine.module] == mine.name:
                yield from _group(mine.module, self.state, ours.state, theirs.state, "forward", precision)

    def _weights(self) -> tuple[Arrays, Arrays]:
        """Return the weights of the sum of the outputs that gradients are taken of, for each side."""
        random = np.random.default_rng(self.seed)
        outputs = [(a, b) for a, b in self.pairs if not a.module and not b.module]
        weights = [
            (a.name, b.name, random.standard_normal(a.value.shape))
            for a, b in outputs
            if a.value.shape == b.value.shape and floating(a.value) and floating(b.value)
        ]
        return {a: values for a, _, values in weights}, {b: values for _, b, values in weights}

    def _gradients(self, precision: Precision, ours: Arrays, theirs: Arrays) -> Iterator[Comparison]:
        """Compare gradients from the outputs back: of values, of a module's parameters after its parts, of inputs."""
        a, b = (run.backward(weights) for run, weights in zip(self.runs[precision], (ours, theirs), strict=True))
        due: dict[str, list[str]] = {}  # the modules whose parts have all been passed, by the value where that is
        for module in dict.fromkeys(map(module_of, self.parameters)):
            inside = (
                mine.name for mine, _ in self.pairs if f"{mine.module}/".startswith(f"{module}/" if module else "")
            )
            due.setdefault(next(inside, ""), []).append(module)
        for mine, other in reversed(self.pairs):
            scale = 0.0
            if mine.name in a.values and other.name in b.values:
                gradient = b.values[other.name]
                stage = f"gradient {mine.name}"
                yield compared(stage, a.values[mine.name], other.name, gradient, "gradient", precision)
                scale = largest(gradient)
            for module in sorted(due.get(mine.name, ()), key=len, reverse=True):
                yield from _group(module, self.parameters, a.parameters, b.parameters, "gradient", precision, scale)
        for module in due.get("", ()):
            yield from _group(module, self.parameters, a.parameters, b.parameters, "gradient", precision)
        for place in sorted(a.inputs.keys() & b.inputs.keys()):
            name = f"input[{place}]"
            yield compared(f"gradient {name}", a.inputs[place], name, b.inputs[place], "gradient", precision)

    def _alone(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names without a partner, of values, parameters and state."""
        of_state = self.parameters | self.state
        paired = [
            {a.name for a, _ in self.pairs} | of_state.keys(),
            {b.name for _, b in self.pairs} | {partner for partner, _ in of_state.values()},
        ]
        ours, theirs = (
            tuple(n for n in (*(v.name for v in run.values), *side.parameters, *side.state) if n not in names)
            for side, run, names in zip(self.sides, self.first, paired, strict=True)
        )
        return ours, theirs

    def _notes(self) -> Iterator[str]:
        """State what is random, not finite, in another mode, or different from the start."""
        for which, side in enumerate(self.sides):
            if names := self.random[which]:
                yield f"{side.library} is random, first at {names[0]!r}: two runs differ there, by dropout or the like."
                if side.dropping:
                    yield f"{side.library}'s modules that drop, in training mode: {', '.join(side.dropping)}."
            floats = [value for value in self.first[which].values if floating(value.value)]
            if bad := next((v for v in floats if not np.isfinite(v.value.astype(np.float64)).all()), None):
                yield f"{side.library}'s first value not to be finite is {bad.name!r}: {not_finite(bad.value)}."
            for precision, runs in self.runs.items():
                floats = [value for value in runs[which].values if floating(value.value)]
                if low := next((value for value in floats if value.value.dtype != precision), None):
                    yield f"{side.library} computes {low.name!r} in {low.value.dtype}, of what was to be {precision}."
        ours, theirs = self.sides
        for name, (partner, _) in self.state.items():
            moved = [
                not np.array_equal(side.state[key], run.state[key])
                for side, run, key in zip(self.sides, self.first, (name, partner), strict=True)
            ]
            if moved[0] != moved[1]:
                alone = ours.library if moved[0] else theirs.library
                yield f"Only {alone} updates {name!r} ({partner!r}): the other side does not train."
                break
        unequal = [
            f"{name!r} ({partner!r})"
            for name, (partner, arrange) in self.parameters.items()
            if not np.array_equal(ours.parameters[name].ravel(), arrange(theirs.parameters[partner]).ravel())
        ]
        if unequal:
            yield f"Not the same weights on both sides: {', '.join(unequal)}."

    def _place(self, precision: Precision, first: Comparison) -> str:
        """State where the first departure arises, from what agrees before it; nothing of running statistics."""
        if first.stage.startswith("gradient "):
            return "All values agree: it is the backward passes that part."
        names = [(a.name, b.name) for a, b in self.pairs]
        if (first.stage, first.tensor) not in names:
            return ""
        place = names.index((first.stage, first.tensor))
        before = self.pairs[place - 1][0] if place else None
        after = f" after {before.name!r}, which agrees" if before else ""
        ours, theirs = (
            next(value.source for value in run.values if value.name == name)
            for run, name in zip(self.runs[precision], names[place], strict=True)
        )
        if ours is None or theirs is None or not merges(ours.shape, theirs.shape):
            return f"It arises{after}.{self._between(place)}" if before else ""
        if not compared("", ours, "", theirs, "forward", precision).passed:
            return f"Its input departs already: it arises{after or ' in the inputs'}.{self._between(place)}"
        module = self.pairs[place][0].module
        inside = before is not None and before.module.startswith(f"{module}/" if module else "")
        return f"Its input agrees: it arises inside{after if inside else ''}."

    def _between(self, place: int) -> str:
        """Name what either side has alone between a pair and the one before it."""
        found: list[str] = []
        if not place:
            return ""
        for which, run in enumerate(self.first):
            names = [value.name for value in run.values]
            start, end = (names.index(pair[which].name) for pair in (self.pairs[place - 1], self.pairs[place]))
            if between := names[start + 1 : end]:
                found.append(f"{self.sides[which].library} has {', '.join(map(repr, between))} there")
        return f" {' and '.join(found)}." if found else ""


def _unlike(run: Run, again: Run) -> list[str]:
    """Return the values that the second run does not repeat."""
    second = {value.name: value.value for value in again.values}
    return [
        one.name
        for one in run.values
        if np.isfinite(one.value.astype(np.float64)).all()
        and not compared("", second.get(one.name, np.zeros(0)), "", one.value, "forward", None).passed
    ]


def _group(
    module: str, pairs: Parameters, ours: Arrays, theirs: Arrays, kind: Kind, precision: Precision, scale: float = 0.0
) -> Iterator[Comparison]:
    """Compare the parameters of one module, or its state, relative to the largest of them all.

    A gradient that is zero but for rounding, as of a bias before a normalisation, has no scale of its own.
    """
    found = [
        (n, ours[n], other, arrange(theirs[other])) for n, (other, arrange) in pairs.items() if module_of(n) == module
    ]
    scale = max([scale, *(largest(b) for *_, b in found)])
    for name, a, other, b in found:
        stage = f"gradient {module or name}" if kind == "gradient" else module or name
        yield compared(stage, a, other, b, kind, precision, scale=scale)


@dataclass(frozen=True)
class TraceArguments:
    """Compare a Flax module with a PyTorch module, layer by layer."""

    pair: tyro.conf.Positional[str]
    """FILE.py:FUNCTION. The function returns the arguments of `parity.trace`: a tuple of the first four or five, or a
    dictionary by their names. The file is executed."""


def trace_command(arguments: TraceArguments) -> int:
    """Return 0 where the two agree, 1 where they part or one of them raised, 2 on wrong usage."""
    try:
        given = _call(arguments.pair)
        report = trace(**given) if isinstance(given, Mapping) else trace(*given)
    except StatedError as error:
        print(error, file=sys.stderr)
        return 2 if error.field else 1
    print(report)
    return 0 if report.passed else 1


def _call(pair: str) -> Any:
    """Execute a file, which may import its neighbours, and return what its function returns."""
    path, _, name = pair.rpartition(":")
    spec = importlib.util.spec_from_file_location("traced_pair", path) if Path(path).is_file() else None
    if spec is None or spec.loader is None:
        raise StatedError(f"{pair!r} does not name a file that is there, as FILE.py:FUNCTION", field="pair")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses, as linen's modules are, look for their module
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        spec.loader.exec_module(module)
        function = getattr(module, name, None)
        given = function() if callable(function) else None
    except Exception as error:
        traceback.print_exc()
        raise StatedError(f"{pair} raised {type(error).__name__}", field="pair") from error
    finally:
        del sys.path[0], sys.modules[spec.name]
    if not callable(function):
        raise StatedError(f"{path} has no function {name!r}", field="pair")
    names = list(inspect.signature(trace).parameters)
    fits = (
        set(names[:4]) <= given.keys() <= set(names)
        if isinstance(given, Mapping)
        else isinstance(given, tuple) and len(given) in (4, 5)
    )
    if not fits:
        raise StatedError(
            f"{pair} returned {shown(given)}, not a tuple (module, variables, torch_module, inputs[, torch_inputs]) "
            f"nor a dictionary of {', '.join(names)}",
            field="pair",
        )
    return given
