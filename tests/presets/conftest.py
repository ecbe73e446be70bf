"""Settings of these tests."""

import jax
import pytest


@pytest.fixture
def quick_compilation():
    """Compile without optimisation: tiny arrays, where to compile costs more than to compute."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
