"""What each module of a model returns, and the gradient there: Flax (linen and NNX) and PyTorch in one form.

Neither side is changed: Flax's modules are functional, NNX's are split and merged, and PyTorch's is copied. Arrays that
a lifted transformation keeps to itself (the steps of `nn.scan`) are not seen.
"""

import copy
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jaxtyping import Shaped

from mae_jax.errors import StatedError
from parity.bounds import Precision

Array = Shaped[np.ndarray, "..."]
Arrays = dict[str, Array]
OUTPUT = "(output)"  # the name of what the whole model returns
_COLLECTION = "parity"  # linen's collection for captured values


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


class Side(Protocol):
    """A model with its weights and inputs.

    parameters, state: as the caller has them, by the library's own names; state is what is no parameter.
    """

    library: str
    parameters: Arrays
    state: Arrays

    def run(self, precision: Precision, seed: int) -> Run:
        """Run the model with weights and inputs of this precision; the seed is of its own random choices.

        Raises:
          StatedError: the forward pass raised.
        """
        ...


class Flax:
    """A module of Flax, linen's with its variables or NNX's.

    Raises:
      StatedError: the variables have no parameters.
    """

    library = "Flax"

    def __init__(
        self, module: Any, variables: Any, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], method: str
    ) -> None:
        made = _nnx(module) if isinstance(module, nnx.Module) else _linen(module, variables)
        self._apply, self._parameters, self._state = made
        self._inputs, self._method, self._record = (inputs, dict(kwargs)), method, _Record()
        self._forward = jax.jit(self._traced)
        self.parameters = _by_name(self._parameters)
        self.state = _by_name(self._state if isinstance(module, nnx.Module) else list(self._state.values()))

    def _traced(self, seed: Any, state: Any, fixed: Any, parameters: Any, varied: Any, added: Any) -> Any:
        """Return the floating-point outputs by name; and all that was captured, and the state after."""
        record = self._record
        record.start(added)
        arrays = fixed | varied
        count = itertools.count()
        args, kwargs = _changed(self._inputs, lambda _, array: arrays[next(count)])
        captured, after = self._apply(parameters, state, seed, record, self._method, args, kwargs)
        outputs = {name: one.output for name, one in captured.items() if not record.modules[name]}
        return {name: output for name, output in outputs.items() if _floating(output)}, (captured, after)

    def run(self, precision: Precision, seed: int) -> Run:
        with _settings(precision), _stated(f"Flax's forward pass in {precision}", self._record):
            parameters, state = _cast(self._parameters, precision), _cast(self._state, precision)
            arrays = dict(enumerate(_cast(_arrays(self._inputs), precision)))
            varied = {place: array for place, array in arrays.items() if _floating(array)}
            fixed = {place: array for place, array in arrays.items() if place not in varied}
            forward = partial(self._forward, jnp.uint32(seed), state, fixed)
            captured = jax.eval_shape(forward, parameters, varied, {})[1][0]
            # Zeros added to each value: the gradient with regard to them is the gradient there.
            added = {
                name: jnp.zeros(one.output.shape, one.output.dtype)
                for name, one in captured.items()
                if _floating(one.output)
            }
            outputs, vjp, (captured, after) = jax.vjp(forward, parameters, varied, added, has_aux=True)
            modules = dict(self._record.modules)

        def backward(weights: Arrays) -> Gradients:
            with _settings(precision), _stated(f"Flax's backward pass in {precision}", self._record):
                zeros = {name: np.zeros(output.shape) for name, output in outputs.items()}
                to_parameters, to_inputs, to_values = vjp(
                    {name: jnp.asarray((zeros | weights)[name], output.dtype) for name, output in outputs.items()}
                )
                return Gradients(
                    {name: _numpy(gradient) for name, gradient in to_values.items()},
                    _by_name(to_parameters),
                    {place: _numpy(gradient) for place, gradient in to_inputs.items()},
                )

        kept = {name: captured[name] for name in modules if name in captured}
        return Run(_values(modules, kept), _by_name(after), backward)


class Torch:
    """A module of PyTorch; a copy of it runs, on the CPU."""

    library = "PyTorch"

    def __init__(self, module: torch.nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._module, self._inputs = module, (inputs, dict(kwargs))
        self.parameters = {name: _numpy(p) for name, p in module.named_parameters(remove_duplicate=False)}
        self.state = {name: _numpy(buffer) for name, buffer in module.named_buffers() if _floating(buffer)}

    def run(self, precision: Precision, seed: int) -> Run:
        dtype, default = getattr(torch, precision), torch.get_default_dtype()
        record, kept, varied = _Record(), dict[str, _Captured](), dict[int, torch.Tensor]()
        count = itertools.count()

        def vary(_: str, array: Any) -> torch.Tensor:
            tensor, place = _tensor(array, dtype), next(count)
            if not tensor.is_floating_point():
                return tensor
            varied[place] = tensor.requires_grad_()
            return tensor.clone()  # a module may write into what it is given

        with (
            _stated(f"PyTorch's forward pass in {precision}", record),
            torch.enable_grad(),
            torch.random.fork_rng(devices=[]),
        ):
            torch.manual_seed(seed)
            module = copy.deepcopy(self._module).to("cpu", dtype)
            parameters = dict(module.named_parameters(remove_duplicate=False))
            for parameter in parameters.values():
                parameter.requires_grad_(parameter.is_floating_point())
            args, kwargs = _changed(self._inputs, vary)
            for path, part in module.named_modules():
                _hook(part, path, record, kept)
            torch.set_default_dtype(dtype)
            try:
                module(*args, **kwargs)
            finally:
                torch.set_default_dtype(default)

        def backward(weights: Arrays) -> Gradients:
            tensors = {name: one.output for name, one in kept.items() if one.output.is_floating_point()}
            leaves = [*tensors.values(), *parameters.values(), *varied.values()]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            ends = [name for name in weights if tensors[name].requires_grad]
            given = [_tensor(weights[name], tensors[name].dtype) for name in ends]
            with _stated(f"PyTorch's backward pass in {precision}", record):
                found = torch.autograd.grad([tensors[name] for name in ends], wanted, given, allow_unused=True)
            gradients = {id(leaf): gradient for leaf, gradient in zip(wanted, found, strict=True)}

            def at(leaf: torch.Tensor) -> Array:
                gradient = gradients.get(id(leaf))
                return _numpy(torch.zeros_like(leaf) if gradient is None else gradient)

            return Gradients(
                {name: at(tensor) for name, tensor in tensors.items()},
                {name: at(parameter) for name, parameter in parameters.items()},
                {place: at(tensor) for place, tensor in varied.items()},
            )

        state = {name: _numpy(buffer) for name, buffer in module.named_buffers() if _floating(buffer)}
        return Run(_values(record.modules, kept), state, backward)


@flax.struct.dataclass
class _Captured:
    output: Any
    source: Any


class _Variable(nnx.Variable):
    """Holds a captured value in an NNX module."""


class _Record:
    """The modules that are running, and the names of the values so far, in order, with the modules' paths."""

    def __init__(self) -> None:
        self.start({})

    def start(self, added: Mapping[str, Any]) -> None:
        self.added = added  # to each value by its name
        self.running: list[tuple[str, Any]] = []
        self.modules: dict[str, str] = {}
        self.calls: Counter[str] = Counter()

    def enter(self, path: str, given: Any) -> None:
        """Note that a module runs, and the first floating-point array that it is given."""
        source = next(filter(_floating, _arrays(given)), None)
        # PyTorch's modules may write into it.
        self.running.append((path, source.detach().clone() if isinstance(source, torch.Tensor) else source))

    def leave(self, path: str, output: Any, store: Callable[[str, _Captured], Any]) -> Any:
        """Store each array that a module returns, and return what stands for it from here on."""
        place, source = self.running.pop()
        while place != path:  # it raised, and the model went on without it
            place, source = self.running.pop()
        self.calls[path] += 1
        call = f"#{self.calls[path]}" if self.calls[path] > 1 else ""

        def change(label: str, array: Any) -> Any:
            name = f"{path or OUTPUT}{call}{label}"
            self.modules[name] = path
            return store(name, _Captured(array + self.added[name] if name in self.added else array, source))

        return _changed(output, change)


def _linen(module: nn.Module, variables: Any) -> tuple[Any, Any, Any]:
    """Return what applies a linen module, its parameters and the rest of its variables."""
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise StatedError("variables have no 'params'; give what module.init returns", field="variables")
    trees = flax.core.unfreeze(dict(variables))
    state = {name: tree for name, tree in trees.items() if name != "params"}

    def apply(params: Any, state: Any, seed: Any, record: _Record, method: str, args: Any, kwargs: Any) -> Any:
        def intercept(run: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            part = context.module
            if context.method_name != ("__call__" if part.path else method):
                return run(*args, **kwargs)

            def store(name: str, captured: _Captured) -> Any:
                part.sow(_COLLECTION, name, captured, lambda _, new: new, lambda: None)
                return captured.output

            path = "/".join(part.path)
            record.enter(path, (args, kwargs))
            return record.leave(path, run(*args, **kwargs), store)

        key = jax.random.key(seed)
        with nn.intercept_methods(intercept):
            _, after = module.apply(
                {"params": params, **state},
                *args,
                rngs={"params": key, "dropout": jax.random.fold_in(key, 1)},  # other streams fall back to "params"
                mutable=[*state, _COLLECTION],
                method=method,
                **kwargs,
            )
        return _captured(after.get(_COLLECTION, {})), [tree for name, tree in after.items() if name != _COLLECTION]

    return apply, nn.meta.unbox(trees["params"]), nn.meta.unbox(state)


def _nnx(module: nnx.Module) -> tuple[Any, Any, Any]:
    """Return what applies an NNX module, its parameters and the rest of its state."""
    graph, params, state = nnx.split(module, nnx.Param, ...)

    def reseed(variable: Any, seed: Any) -> Any:
        return variable.replace(variable[...] + seed) if isinstance(variable, nnx.RngCount) else variable

    def apply(params: Any, state: Any, seed: Any, record: _Record, method: str, args: Any, kwargs: Any) -> Any:
        state = jax.tree.map(partial(reseed, seed=seed), state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        copied = nnx.merge(graph, params, state)
        for path, part in list(nnx.iter_modules(copied)):
            if callable(part):
                _observe(part, "/".join(map(str, path)), method if not path else "__call__", record)
        getattr(copied, method)(*args, **kwargs)
        captured = nnx.pop(copied, _Variable)
        return _captured(captured), nnx.state(copied, nnx.Not(nnx.Param))

    return apply, params, state


def _observe(part: nnx.Module, path: str, method: str, record: _Record) -> None:
    """Store what a module of a merged copy returns, by giving it a class of its own with another method."""
    kind = type(part)

    def observed(self: Any, *args: Any, **kwargs: Any) -> Any:
        def store(name: str, captured: _Captured) -> Any:
            setattr(self, name, _Variable(captured))
            return captured.output

        record.enter(path, (args, kwargs))
        return record.leave(path, getattr(kind, method)(self, *args, **kwargs), store)

    part.__class__ = type(kind.__name__, (kind,), {method: observed})


def _hook(part: torch.nn.Module, path: str, record: _Record, kept: dict[str, _Captured]) -> None:
    """Keep what a module returns, and hand on a copy of it, into which the next module may write."""

    def store(name: str, captured: _Captured) -> torch.Tensor:
        kept[name] = captured
        output: torch.Tensor = captured.output.clone()
        return output

    part.register_forward_pre_hook(lambda _, args, kwargs: record.enter(path, (args, kwargs)), with_kwargs=True)
    part.register_forward_hook(lambda _, args, output: record.leave(path, output, store))


@contextmanager
def _settings(precision: Precision) -> Iterator[None]:
    with jax.enable_x64(precision == "float64"), jax.default_matmul_precision("highest"):
        yield


@contextmanager
def _stated(what: str, record: _Record) -> Iterator[None]:
    """State what raised, and in which module."""
    try:
        yield
    except Exception as error:
        place = f" in {record.running[-1][0]!r}" if record.running and record.running[-1][0] else ""
        lines = str(error).strip().splitlines() or [""]
        message = f"{what} raised {type(error).__name__}{place}: {lines[0]}"
        raise StatedError(message) from error


def _changed(tree: Any, change: Callable[[str, Any], Any], label: str = "") -> Any:
    """Return the arguments or outputs of a call with `change(label, array)` for each array in them."""
    if isinstance(tree, Mapping):
        inner = {key: _changed(value, change, f"{label}[{key}]") for key, value in tree.items()}
        return type(tree)(inner)  # type: ignore[call-arg]
    if isinstance(tree, tuple | list):
        items = [_changed(value, change, f"{label}[{place}]") for place, value in enumerate(tree)]
        return tree._make(items) if hasattr(tree, "_make") else type(tree)(items)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type | nn.Module):
        fields = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree) if field.init}
        return dataclasses.replace(
            tree, **{key: _changed(value, change, f"{label}[{key}]") for key, value in fields.items()}
        )
    return change(label, tree) if hasattr(tree, "dtype") and hasattr(tree, "shape") else tree


def _arrays(tree: Any) -> list[Any]:
    """Return all arrays in the arguments of a call, in order."""
    found: list[Any] = []
    _changed(tree, lambda _, array: found.append(array))
    return found


def _floating(array: Any) -> bool:
    if isinstance(array, torch.Tensor):
        return array.is_floating_point()
    return hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.floating)


def _numpy(array: Any) -> Array:
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        # NumPy alone has no bfloat16.
        return array.float().numpy().astype(jnp.bfloat16) if array.dtype == torch.bfloat16 else array.numpy()
    return np.asarray(array)


def _tensor(array: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return a copy as a tensor of PyTorch, of this type where it is floating-point."""
    if not isinstance(array, torch.Tensor):
        array = np.array(array, np.float64) if _floating(array) else np.array(array)
    tensor = torch.as_tensor(array).detach().to("cpu", copy=True)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _cast(tree: Any, precision: Precision) -> Any:
    """Return the tree with its floating-point arrays in this precision."""

    def cast(leaf: Any) -> Any:
        leaf = _numpy(leaf) if isinstance(leaf, torch.Tensor) else leaf
        return jnp.asarray(np.asarray(leaf), precision) if _floating(leaf) else leaf

    return jax.tree.map(cast, tree)


def _by_name(tree: Any) -> Arrays:
    """Return the floating-point arrays of nested dictionaries, a list of them, or an NNX state by their paths."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    keys = jax.tree_util.DictKey
    named = {"/".join(str(key.key) for key in path if isinstance(key, keys)): leaf for path, leaf in leaves}
    return {name: _numpy(leaf) for name, leaf in named.items() if _floating(leaf)}


def _captured(tree: Any) -> dict[str, _Captured]:
    """Return what was captured by the names of the values, wherever in the model it is."""
    keys = jax.tree_util.DictKey
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, _Captured))[0]
    return {str([key.key for key in path if isinstance(key, keys)][-1]): leaf for path, leaf in leaves}


def _values(modules: Mapping[str, str], kept: Mapping[str, _Captured]) -> tuple[Value, ...]:
    return tuple(
        Value(name, modules[name], _numpy(one.output), None if one.source is None else _numpy(one.source))
        for name, one in kept.items()
    )
