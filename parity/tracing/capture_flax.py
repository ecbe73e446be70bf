"""What the modules of a Flax model return, linen's or NNX's, by methods that are intercepted.

Nothing of the caller's is changed: linen's modules are functional, NNX's are split and merged. Captured values leave
the model as variables do, through lifted transformations such as `nn.remat`; the steps of `nn.scan` are not seen.
"""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from mae_jax.errors import StatedError, shown
from parity.bounds import Precision
from parity.tracing.captures import (
    Arrays,
    Captured,
    Gradients,
    Record,
    Run,
    arrays_in,
    as_array,
    changed,
    floating,
    stated,
    values_of,
)

_COLLECTION = "parity"  # linen's collection for captured values


class Flax:
    """A module of Flax, linen's with its variables or NNX's.

    parameters, state: as the caller has them, by their paths; state is what is no parameter.

    Raises:
      StatedError: this is no module of Flax, or the variables have no parameters.
    """

    library = "Flax"
    dropping: tuple[str, ...] = ()  # which of its modules drop something is not seen from outside

    def __init__(
        self, module: Any, variables: Any, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], method: str
    ) -> None:
        made = _nnx(module) if isinstance(module, nnx.Module) else _linen(module, variables)
        self._apply, self._parameters, self._state = made
        self._inputs, self._method, self._record = (inputs, dict(kwargs)), method, Record()
        self._forward = jax.jit(self._traced)
        self.parameters = _by_name(self._parameters)
        self.state = _by_name(self._state if isinstance(module, nnx.Module) else list(self._state.values()))

    def _traced(self, seed: Any, state: Any, fixed: Any, parameters: Any, varied: Any, added: Any) -> Any:
        """Return the floating-point outputs by name; and all that was captured, and the state after."""
        record = self._record
        record.start(added)
        arrays = fixed | varied
        count = itertools.count()
        args, kwargs = changed(self._inputs, lambda _, array: arrays[next(count)])
        captured, after = self._apply(parameters, state, seed, record, self._method, args, kwargs)
        outputs = {name: one.output for name, one in captured.items() if not record.modules[name]}
        return {name: output for name, output in outputs.items() if floating(output)}, (captured, after)

    def run(self, precision: Precision, seed: int) -> Run:
        """Run the model with weights and inputs of this precision; the seed is of its own random choices.

        Raises:
          StatedError: the model raised.
        """
        with _settings(precision), stated(f"Flax's forward pass in {precision}", self._record):
            parameters, state = _cast(self._parameters, precision), _cast(self._state, precision)
            arrays = dict(enumerate(_cast(arrays_in(self._inputs), precision)))
            varied = {place: array for place, array in arrays.items() if floating(array)}
            fixed = {place: array for place, array in arrays.items() if place not in varied}
            forward = partial(self._forward, jnp.uint32(seed), state, fixed)
            captured = jax.eval_shape(forward, parameters, varied, {})[1][0]
            # Zeros added to each value: the gradient with regard to them is the gradient there.
            added = {
                name: jnp.zeros(one.output.shape, one.output.dtype)
                for name, one in captured.items()
                if floating(one.output)
            }
            outputs, vjp, (captured, after) = jax.vjp(forward, parameters, varied, added, has_aux=True)
            modules, reached = dict(self._record.modules), set(self._record.reached)

        def backward(weights: Arrays) -> Gradients:
            with _settings(precision), stated(f"Flax's backward pass in {precision}", self._record):
                zeros = {name: np.zeros(output.shape) for name, output in outputs.items()}
                to_parameters, to_inputs, to_values = vjp(
                    {name: jnp.asarray((zeros | weights)[name], output.dtype) for name, output in outputs.items()}
                )
                return Gradients(
                    {name: as_array(to_values[name]) for name in reached},
                    _by_name(to_parameters),
                    {place: as_array(gradient) for place, gradient in to_inputs.items()},
                )

        kept = {name: captured[name] for name in modules if name in captured}
        return Run(values_of(modules, kept), _by_name(after), backward)


class _Variable(nnx.Variable):
    """Holds a captured value in an NNX module."""


def _linen(module: nn.Module, variables: Any) -> tuple[Any, Any, Any]:
    """Return what applies a linen module, its parameters and the rest of its variables."""
    if not isinstance(module, nn.Module):
        raise StatedError(f"module is {shown(module)}, not one of flax.linen or flax.nnx", field="module")
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise StatedError("variables have no 'params'; give what module.init returns", field="variables")
    trees = flax.core.unfreeze(dict(variables))
    state = {name: tree for name, tree in trees.items() if name != "params"}

    def apply(params: Any, state: Any, seed: Any, record: Record, method: str, args: Any, kwargs: Any) -> Any:
        def intercept(run: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            part = context.module
            if context.method_name != ("__call__" if part.path else method):
                return run(*args, **kwargs)

            def store(name: str, captured: Captured) -> Any:
                part.sow(_COLLECTION, name, captured, lambda _, new: new, lambda: None)
                return captured.output

            path = "/".join(part.path)
            record.enter(path, (args, kwargs))
            return record.leave(path, run(*args, **kwargs), store)

        key = jax.random.key(seed)
        # Without a jit of its own: `nn.jit` takes the trace of one module for all that are alike.
        with nn.intercept_methods(intercept), jax.disable_jit():
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
    graph, *states = nnx.split(module, nnx.Param, ...)
    params, rest = states

    def reseed(variable: Any, seed: Any) -> Any:
        return variable.replace(variable[...] + seed) if isinstance(variable, nnx.RngCount) else variable

    def apply(params: Any, state: Any, seed: Any, record: Record, method: str, args: Any, kwargs: Any) -> Any:
        state = jax.tree.map(partial(reseed, seed=seed), state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        copied = nnx.merge(graph, params, state)
        for path, part in list(nnx.iter_modules(copied)):
            if callable(part):
                _observe(part, "/".join(map(str, path)), method if not path else "__call__", record)
        getattr(copied, method)(*args, **kwargs)
        captured = nnx.pop(copied, _Variable)
        return _captured(captured), nnx.state(copied, nnx.Not(nnx.Param))

    return apply, params, rest


def _observe(part: nnx.Module, path: str, method: str, record: Record) -> None:
    """Store what a module of a merged copy returns, by giving it a class of its own with another method."""
    kind = type(part)

    def observed(self: Any, *args: Any, **kwargs: Any) -> Any:
        def store(name: str, captured: Captured) -> Any:
            setattr(self, name, _Variable(captured))
            return captured.output

        record.enter(path, (args, kwargs))
        return record.leave(path, getattr(kind, method)(self, *args, **kwargs), store)

    part.__class__ = type(kind.__name__, (kind,), {method: observed})


@contextmanager
def _settings(precision: Precision) -> Iterator[None]:
    """Compute in this precision, products included, as the model is written: what runs once is not worth optimising."""
    option = "jax_disable_most_optimizations"
    before = jax.config.values[option]
    with jax.enable_x64(precision == "float64"), jax.default_matmul_precision("highest"):
        jax.config.update(option, True)
        try:
            yield
        finally:
            jax.config.update(option, before)


def _cast(tree: Any, precision: Precision) -> Any:
    """Return the tree with its floating-point arrays in this precision."""

    def cast(leaf: Any) -> Any:
        leaf = as_array(leaf) if isinstance(leaf, torch.Tensor) else leaf
        return jnp.asarray(np.asarray(leaf), precision) if floating(leaf) else leaf

    return jax.tree.map(cast, tree)


def _by_name(tree: Any) -> Arrays:
    """Return the floating-point arrays of nested dictionaries, a list of them, or an NNX state by their paths."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    keys = jax.tree_util.DictKey
    named = {"/".join(str(key.key) for key in path if isinstance(key, keys)): leaf for path, leaf in leaves}
    return {name: as_array(leaf) for name, leaf in named.items() if floating(leaf)}


def _captured(tree: Any) -> dict[str, Captured]:
    """Return what was captured by the names of the values, wherever in the model it is."""
    keys = jax.tree_util.DictKey
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, Captured))[0]
    return {str([key.key for key in path if isinstance(key, keys)][-1]): leaf for path, leaf in leaves}
