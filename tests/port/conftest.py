"""Small models to carry around, and the libraries that they are carried to."""

import importlib.util

import jax
import numpy as np
import pytest

from mae_jax.config import ClassifierConfig, ModelConfig, TransformerConfig
from mae_jax.port.keys import entries, from_fair
from tests.peers import peer

PEERS = ("lightly.models.modules", "timm", "transformers.models.vit_mae.modeling_vit_mae")

TINY = ModelConfig(
    image_size=32,
    patch_size=8,
    encoder=TransformerConfig(width=48, depth=2, heads=3),
    decoder=TransformerConfig(width=32, depth=1, heads=4),
    norm_pix_loss=True,
)
# No two sizes alike, not the paper's ratios, one channel.
ODD = ModelConfig(
    image_size=30,
    patch_size=6,
    in_channels=1,
    encoder=TransformerConfig(width=40, depth=3, heads=5, mlp_ratio=2.5),
    decoder=TransformerConfig(width=24, depth=2, heads=2, mlp_ratio=2.5),
    mask_ratio=0.6,
)


def draw_params(config, part="all", dtype=np.float32):
    """Parameters of which no tensor is constant."""
    generator = np.random.default_rng(0)
    drawn = {e.key: (0.1 * generator.standard_normal(e.shape)).astype(dtype) for e in entries(config, part)}
    return from_fair(drawn, config, part)


CLASSIFIERS = {pooling: ClassifierConfig(TINY, 7, pooling) for pooling in ("mean", "class")}


@pytest.fixture(scope="session", autouse=True)
def _importable():
    """timm and lightly warn of each other, and of torchvision, as they are imported."""
    for name in PEERS if importlib.util.find_spec("torch") else ():
        peer(name)


def same(ours, again):
    """Whether two trees have the same values, to the bit; they must have the same structure."""
    assert jax.tree.structure(ours) == jax.tree.structure(again)
    return all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (ours, again)), strict=True))
