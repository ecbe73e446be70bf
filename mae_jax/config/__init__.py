"""Configuration: frozen dataclasses that are valid once they exist.

A combination that cannot work raises ValueError where it is built, naming both fields and their values.
"""

from mae_jax.config.inputs import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig, MixConfig
from mae_jax.config.model import (
    MODELS,
    AttentionKernel,
    ClassifierConfig,
    Dtype,
    Masking,
    ModelConfig,
    Pooling,
    Positions,
    Size,
    TransformerConfig,
    wide,
)
from mae_jax.config.optim import OptimConfig
from mae_jax.config.runs import OF_ONE_HOST, OPERATIONAL, FinetuneConfig, PretrainConfig, RunConfig

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MODELS",
    "OF_ONE_HOST",
    "OPERATIONAL",
    "AttentionKernel",
    "AugmentConfig",
    "ClassifierConfig",
    "Dtype",
    "FinetuneConfig",
    "Masking",
    "MixConfig",
    "ModelConfig",
    "OptimConfig",
    "Pooling",
    "Positions",
    "PretrainConfig",
    "RunConfig",
    "Size",
    "TransformerConfig",
    "wide",
]
