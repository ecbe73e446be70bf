"""Masked Autoencoder pretraining in JAX/Flax (He et al. 2021, arXiv 2111.06377), proved against PyTorch."""

import importlib
from typing import Any

_PUBLIC = {
    "MODELS": "mae_jax.config",
    "AugmentConfig": "mae_jax.config",
    "Classifier": "mae_jax.models.classifier",
    "ClassifierConfig": "mae_jax.config",
    "FinetuneConfig": "mae_jax.config",
    "ModelConfig": "mae_jax.config",
    "OptimConfig": "mae_jax.config",
    "PretrainConfig": "mae_jax.config",
    "TransformerConfig": "mae_jax.config",
    "MaskedAutoencoder": "mae_jax.models.mae",
    "StatedError": "mae_jax.errors",
    "load_torch": "mae_jax.port.read",
    "save_torch": "mae_jax.port.write",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import mae_jax` pulls no framework."""
    if name not in _PUBLIC:
        raise AttributeError(f"module mae_jax has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
