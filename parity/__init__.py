"""A PyTorch reference of the masked autoencoder, and the comparison of mae_jax with it, stage by stage.

`parity.trace` compares any other port in the same way, layer by layer.
"""

import importlib
from typing import Any

__all__ = ["trace"]


def __getattr__(name: str) -> Any:
    """Import `trace` when it is first used, so that `import parity` pulls no framework."""
    if name not in __all__:
        raise AttributeError(f"module parity has no attribute {name!r}")
    return getattr(importlib.import_module("parity.tracing"), name)
