"""What the modules of a model return, and the gradients there, in one form for Flax and PyTorch."""

import dataclasses
import itertools
import math
import operator
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import flax
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Shaped

from mae_jax.errors import StatedError

Array = Shaped[np.ndarray, "..."]
Arrays = dict[str, Array]
OUTPUT = "(output)"  # the name of what the whole model returns


@dataclasses.dataclass(frozen=True)
class Value:
    """One array that one call of one module returned.

    name: the module's path, then the call from the second on (`relu#2`), then the place among several (`attn[1]`).
    module: the module's path; empty for the whole model.
    source: the first floating-point array that the call was given, if any.
    """

    name: str
    module: str
    value: Array
    source: Array | None


@dataclasses.dataclass(frozen=True)
class Gradients:
    """The gradient of a weighted sum of the outputs, by names of values and parameters and by places of inputs."""

    values: Arrays
    parameters: Arrays
    inputs: dict[int, Array]


@dataclasses.dataclass(frozen=True)
class Run:
    """What one run of a model computed.

    values: in the order in which the modules returned, the model's own outputs last.
    state: what is no parameter, after the run (running statistics).
    backward: returns the gradients, given the weights of outputs by their names.
    """

    values: tuple[Value, ...]
    state: Arrays
    backward: Callable[[Arrays], Gradients]


@flax.struct.dataclass
class Captured:
    """An array that a module returned, and the first floating-point array that it was given."""

    output: Any
    source: Any


class Record:
    """The modules that are running, and the names of the values so far, in order, with the modules' paths."""

    def __init__(self) -> None:
        self.start({})

    def start(self, added: Mapping[str, Any]) -> None:
        self.added, self.reached = added, set[str]()  # to each value by its name; the names of those it was added to
        self.running: list[tuple[str, Any]] = []
        self.modules: dict[str, str] = {}
        self.calls: Counter[str] = Counter()

    def enter(self, path: str, given: Any) -> None:
        """Note that a module runs, and the first floating-point array that it is given."""
        source = next(filter(floating, arrays_in(given)), None)
        # PyTorch's modules may write into it.
        self.running.append((path, source.detach().clone() if isinstance(source, torch.Tensor) else source))

    def leave(self, path: str, output: Any, store: Callable[[str, Captured], Any]) -> Any:
        """Store each array that a module returns, and return what stands for it from here on."""
        place, source = self.running.pop()
        while place != path:  # it raised, and the model went on without it
            place, source = self.running.pop()
        self.calls[path] += 1
        call = f"#{self.calls[path]}" if self.calls[path] > 1 else ""

        def change(label: str, array: Any) -> Any:
            name = f"{path or OUTPUT}{call}{label}"
            self.modules[name] = path
            # Within a scan or a vmap of NNX a value is smaller than what comes out.
            if name in self.added and self.added[name].shape == array.shape:
                self.reached.add(name)
                array = array + self.added[name]
            return store(name, Captured(array, source))

        return changed(output, change)


@contextmanager
def stated(what: str, record: Record) -> Iterator[None]:
    """State what raised, and in which module."""
    try:
        yield
    except Exception as error:
        place = f" in {record.running[-1][0]!r}" if record.running and record.running[-1][0] else ""
        reason = textwrap.shorten(str(error), 400)
        raise StatedError(f"{what} raised {type(error).__name__}{place}: {reason}") from error


def changed(tree: Any, change: Callable[[str, Any], Any], label: str = "") -> Any:
    """Return the arguments or outputs of a call with `change(label, array)` for each array in them."""
    if isinstance(tree, Mapping):
        inner = {key: changed(value, change, f"{label}[{key}]") for key, value in tree.items()}
        return type(tree)(inner)  # type: ignore[call-arg]
    if isinstance(tree, tuple | list):
        items = [changed(value, change, f"{label}[{place}]") for place, value in enumerate(tree)]
        return tree._make(items) if hasattr(tree, "_make") else type(tree)(items)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type | nn.Module):
        fields = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree) if field.init}
        inner = {name: changed(value, change, f"{label}[{name}]") for name, value in fields.items()}
        return dataclasses.replace(tree, **inner) if any(inner[name] is not fields[name] for name in fields) else tree
    return change(label, tree) if hasattr(tree, "dtype") and hasattr(tree, "shape") else tree


def arrays_in(tree: Any) -> list[Any]:
    """Return all arrays in the arguments of a call, in order."""
    found: list[Any] = []

    def keep(_: str, array: Any) -> Any:
        found.append(array)
        return array

    changed(tree, keep)
    return found


def floating(array: Any) -> bool:
    """Return whether this is an array of floating-point numbers, of any library."""
    if isinstance(array, torch.Tensor):
        return array.is_floating_point()
    return hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.floating)


def as_array(array: Any) -> Array:
    """Return an array of any library as NumPy's, in the same type; real and imaginary part along a last axis."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu().resolve_conj().resolve_neg()
        # NumPy alone has no bfloat16.
        array = array.float().numpy().astype(jnp.bfloat16) if array.dtype == torch.bfloat16 else array.numpy()
    array = np.asarray(array)
    return np.stack((array.real, array.imag), -1) if np.iscomplexobj(array) else array


def merges(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Return whether one shape is the other with neighbouring axes merged: heads and their width, rows and columns."""
    if one == other:
        return True
    if math.prod(one) != math.prod(other):
        return False
    ends, others = ({*itertools.accumulate(shape, operator.mul)} - {1} for shape in (one, other))
    return ends <= others or others <= ends


def values_of(modules: Mapping[str, str], kept: Mapping[str, Captured]) -> tuple[Value, ...]:
    """Return what was captured by names, given the modules of the names."""
    return tuple(
        Value(name, modules[name], as_array(one.output), None if one.source is None else as_array(one.source))
        for name, one in kept.items()
    )
