"""Named recipes by the command that they are for."""

from mae_jax.presets.pretraining import PRESETS

__all__ = ["PRESETS"]
