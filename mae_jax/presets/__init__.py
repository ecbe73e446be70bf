"""Named recipes by the command that they are for."""

from mae_jax.presets.pretraining import PRESETS
from mae_jax.presets.transfer import FINETUNE, PROBE

__all__ = ["FINETUNE", "PRESETS", "PROBE"]
