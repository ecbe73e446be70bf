"""A trace finds at which layer two models part: ports that are not this project's model, with mistakes planted."""

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

import parity
from mae_jax.errors import StatedError
from parity.pairing import Layouts
from tests.peers import peer

F = torch.nn.functional


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tree(state: Mapping[str, Any]) -> dict[str, Any]:
    """PyTorch's parameters as linen's, the modules by their own names: what a port's own conversion does."""
    found: dict[str, Any] = {}
    for name, tensor in state.items():
        *path, kind = name.split(".")
        inner = found
        for part in path:
            inner = inner.setdefault(part, {})
        values = tensor.detach().numpy().copy()
        if kind == "weight":
            kind, values = ("kernel", np.moveaxis(values, (0, 1), (-1, -2))) if values.ndim > 1 else ("scale", values)
        inner[kind] = values
    return found


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The module with all parameters drawn, so that no bias is zero and no scale one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
            if parameter.ndim == 1:
                parameter += 0.5
    return module


# A vision transformer of timm.


@dataclass(frozen=True)
class Mistakes:
    tanh: bool = False
    epsilon: float = 1e-6
    swapped: bool = False
    scaled: bool = True


class Attention(nn.Module):
    mistakes: Mistakes

    @nn.compact
    def __call__(self, x):
        q, k, v = jnp.moveaxis(nn.Dense(96, name="qkv")(x).reshape(*x.shape[:2], 3, 2, 16), (2, 3), (0, 2))
        if self.mistakes.swapped:
            q, k = k, q
        weights = nn.softmax(q @ k.swapaxes(-1, -2) * (16**-0.5 if self.mistakes.scaled else 1.0))
        return nn.Dense(32, name="proj")((weights @ v).swapaxes(1, 2).reshape(x.shape))


class Mlp(nn.Module):
    mistakes: Mistakes

    @nn.compact
    def __call__(self, x):
        return nn.Dense(32, name="fc2")(nn.gelu(nn.Dense(128, name="fc1")(x), approximate=self.mistakes.tanh))


class Block(nn.Module):
    mistakes: Mistakes

    @nn.compact
    def __call__(self, x):
        x = x + Attention(self.mistakes, name="attn")(nn.LayerNorm(self.mistakes.epsilon, name="norm1")(x))
        return x + Mlp(self.mistakes, name="mlp")(nn.LayerNorm(self.mistakes.epsilon, name="norm2")(x))


class ViT(nn.Module):
    mistakes: tuple[Mistakes, Mistakes] = (Mistakes(), Mistakes())

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(32, (8, 8), (8, 8), name="patch_embed")(images).reshape(len(images), -1, 32)
        token = self.param("cls_token", nn.initializers.zeros, (1, 1, 32))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, 32)), x], 1)
        x = x + self.param("pos_embed", nn.initializers.zeros, (1, 17, 32))
        for i, mistakes in enumerate(self.mistakes):
            x = Block(mistakes, name=f"blocks_{i}")(x)
        return nn.Dense(5, name="head")(nn.LayerNorm(1e-6, name="norm")(x)[:, 0])


@pytest.fixture(scope="module")
def vit() -> tuple[Any, ...]:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("the model is timm's, which is not installed")
    transformer = peer("timm.models.vision_transformer")
    torch.manual_seed(0)
    theirs = transformer.VisionTransformer(32, 8, embed_dim=32, depth=2, num_heads=2, num_classes=5).eval()
    randomised(theirs)
    params = tree(theirs.state_dict())
    params |= {f"blocks_{name}": block for name, block in params.pop("blocks").items()}
    params["patch_embed"] = params["patch_embed"]["proj"]
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    return {"params": params}, theirs, (images,), (images.transpose(0, 3, 1, 2),)


def test_a_faithful_port_agrees_everywhere(vit):
    report = parity.trace(ViT(), *[vit[0], *vit[1:]], layouts="NCHW->NHWC")
    print(report)
    assert 0
