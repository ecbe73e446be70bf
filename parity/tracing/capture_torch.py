"""What the modules of a PyTorch model return, by forward hooks on a copy of it."""

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from parity.bounds import Precision
from parity.tracing.captures import (
    Array,
    Arrays,
    Captured,
    Gradients,
    Record,
    Run,
    as_array,
    changed,
    floating,
    stated,
    values_of,
)

_RATES = ("p", "dropout", "drop_prob", "drop_rate")  # as modules that drop call how much


class Torch:
    """A module of PyTorch; a copy of it runs, on the CPU.

    parameters, state: as the caller has them, by their names; state is what is no parameter.
    dropping: its modules that are in training mode and drop something.
    transposed: its transposed convolutions, whose weights are (in, out, ...).
    """

    library = "PyTorch"

    def __init__(self, module: torch.nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._module, self._inputs = module, (inputs, dict(kwargs))
        self.parameters = {name: as_array(p) for name, p in module.named_parameters(remove_duplicate=False)}
        self.state = {name: as_array(buffer) for name, buffer in module.named_buffers() if floating(buffer)}
        self.dropping = tuple(
            name
            for name, part in module.named_modules()
            if part.training and any(isinstance(p := getattr(part, rate, 0), float) and p > 0 for rate in _RATES)
        )
        self.transposed = {name for name, part in module.named_modules() if getattr(part, "transposed", False)}

    def run(self, precision: Precision, seed: int) -> Run:
        """Run a copy with weights and inputs of this precision; the seed is of its own random choices.

        Raises:
          StatedError: the model raised.
        """
        dtype, default = getattr(torch, precision), torch.get_default_dtype()
        record, kept, varied = Record(), dict[str, Captured](), dict[int, torch.Tensor]()
        count = itertools.count()

        def vary(_: str, array: Any) -> torch.Tensor:
            tensor, place = _tensor(array, dtype), next(count)
            if not tensor.is_floating_point():
                return tensor
            varied[place] = tensor.requires_grad_()
            return tensor.clone()  # a module may write into what it is given

        with (
            stated(f"PyTorch's forward pass in {precision}", record),
            torch.enable_grad(),
            torch.random.fork_rng(devices=[]),
        ):
            torch.manual_seed(seed)
            module = copy.deepcopy(self._module).to("cpu", dtype)
            parameters = dict(module.named_parameters(remove_duplicate=False))
            for parameter in parameters.values():
                parameter.requires_grad_(parameter.is_floating_point())
            args, kwargs = changed(self._inputs, vary)
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
            ends = [name for name in weights if name in tensors and tensors[name].requires_grad]
            given = [_tensor(weights[name], tensors[name].dtype) for name in ends]
            with stated(f"PyTorch's backward pass in {precision}", record):
                found = torch.autograd.grad([tensors[name] for name in ends], wanted, given, allow_unused=True)
            gradients = {id(leaf): gradient for leaf, gradient in zip(wanted, found, strict=True)}

            def at(leaf: torch.Tensor) -> Array:
                gradient = gradients.get(id(leaf))
                return as_array(torch.zeros_like(leaf) if gradient is None else gradient)

            return Gradients(
                {name: at(tensor) for name, tensor in tensors.items()},
                {name: at(parameter) for name, parameter in parameters.items()},
                {place: at(tensor) for place, tensor in varied.items()},
            )

        state = {name: as_array(buffer) for name, buffer in module.named_buffers() if floating(buffer)}
        return Run(values_of(record.modules, kept), state, backward)


def _hook(part: torch.nn.Module, path: str, record: Record, kept: dict[str, Captured]) -> None:
    """Keep what a module returns, and hand on a copy of it, into which the next module may write."""

    def store(name: str, captured: Captured) -> torch.Tensor:
        kept[name] = captured
        output: torch.Tensor = captured.output.clone()
        return output

    part.register_forward_pre_hook(lambda _, args, kwargs: record.enter(path, (args, kwargs)), with_kwargs=True)
    part.register_forward_hook(lambda _, args, output: record.leave(path, output, store))


def _tensor(array: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return a copy as a tensor of PyTorch, of this type where it is floating-point."""
    if not isinstance(array, torch.Tensor):
        array = np.array(array, np.float64) if floating(array) else np.array(array)
    tensor = torch.as_tensor(array).detach().to("cpu", copy=True)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
