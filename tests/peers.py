"""The libraries that tests compare with: PyTorch, and what is built on it."""

import importlib
import warnings
from types import ModuleType

import pytest


def peer(module: str) -> ModuleType:
    """Import a module of a library on PyTorch without its warnings; the test is skipped where PyTorch is absent."""
    pytest.importorskip("torch")
    from parity.peers import declare_torchvision_operators

    declare_torchvision_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)
