"""Configuration: frozen dataclasses that are valid once they exist.

A combination that cannot work raises ValueError where it is built, naming both fields and their values.
"""

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
from mae_jax.config.runs import FinetuneConfig, HostConfig, OperationConfig, PretrainConfig, Run, RunConfig
from mae_jax.config.training import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig, MixConfig, OptimConfig

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MODELS",
    "AttentionKernel",
    "AugmentConfig",
    "ClassifierConfig",
    "Dtype",
    "FinetuneConfig",
    "HostConfig",
    "Masking",
    "MixConfig",
    "ModelConfig",
    "OperationConfig",
    "OptimConfig",
    "Pooling",
    "Positions",
    "PretrainConfig",
    "Run",
    "RunConfig",
    "Size",
    "TransformerConfig",
    "wide",
]
