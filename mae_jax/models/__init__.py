"""The masked autoencoder as Flax modules, and the pure functions it is made of."""

from typing import Any

Params = dict[str, Any]  # nested, arrays at its leaves, as `module.init(...)["params"]` gives it
