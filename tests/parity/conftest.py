"""Tests of the comparison: small arrays, on one thread."""

import importlib.util

import pytest


@pytest.fixture(autouse=True)
def one_thread():
    """Let PyTorch compute on one thread: tiny products are no work for two."""
    if importlib.util.find_spec("torch") is None:
        yield
        return
    import torch  # noqa: PLC0415 - some of these tests do without

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
