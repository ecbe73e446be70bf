"""A PyTorch reference of the masked autoencoder, and the comparison of mae_jax with it, stage by stage.

`parity.trace` compares any other port in the same way, layer by layer.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parity.tracing.modules import trace as trace
    from parity.trained import compare as compare

# The public functions, and where each is. They are imported when they are first used: `import parity` pulls no
# framework.
_HOMES = {"compare": "parity.trained", "trace": "parity.tracing.modules"}
__all__ = ["compare", "trace"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module parity has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
