"""Eight simulated devices, and quick compilation. Signatures are checked as functions are called."""

import gc
import os
from collections.abc import Iterator

import hypothesis
import jaxtyping
import pytest

from tests import signatures
from tests.quick import quick

pytest_plugins = ["tests.tiny"]

# Read when jax is imported, and when it first looks for devices.
os.environ |= quick(devices=8, given=os.environ.get("XLA_FLAGS", ""))

# Where arrays have shapes in their signatures; elsewhere the type checker has looked.
jaxtyping.install_import_hook(
    [
        "mae_jax.rng",
        "mae_jax.models",
        "mae_jax.train.optimizers",
        "mae_jax.train.step",
        "mae_jax.train.crops",
        "mae_jax.evaluation",
    ],
    f"{signatures.__name__}.check",
)

# The same examples in every run, and no deadline: the first call of a compiled function is slow.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=40)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="module", autouse=True)
def _set_aside() -> Iterator[None]:
    """What a module leaves in JAX's caches is not searched for garbage again: each search would take a second for it.

    The price: what is alive now and dies later in a cycle is neither freed nor reported.
    """
    yield
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that hold slow tests, so that no process is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
