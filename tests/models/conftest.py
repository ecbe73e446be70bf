"""Model code must state where it changes a dtype: nothing is promoted implicitly."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def double():
    """float64, where rounding hides nothing."""
    with jax.enable_x64(True):
        yield
