"""Settings of a process that computes on the CPU."""

import os
import platform
import subprocess
import sys

import pytest

from mae_jax.config import MODELS
from mae_jax.presets import PRESETS
from mae_jax.train import cpu

FAULTS = """
import ctypes, resource, sys
from mae_jax.train.cpu import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory(one_arena=True)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(100 << 20)
    ctypes.memset(block, 1, 100 << 20)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_a_block_that_comes_again_is_not_cleared_again():
    plain, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, word], check=True, capture_output=True, text=True).stdout)
        for word in ("plain", "keep")
    )
    assert kept < 100 < plain


def test_flags_that_are_given_stay(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=true --xla_dump_to=x")
    cpu.tune_compiler()
    cpu.tune_compiler()
    assert os.environ["XLA_FLAGS"] == (
        "--xla_cpu_multi_thread_eigen=true --xla_dump_to=x --xla_backend_optimization_level=1"
    )


def test_beside_an_accelerator_nothing_is_set(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: object())
    cpu.settle(MODELS["vit_base_patch16"], 256)
    assert os.environ["XLA_FLAGS"] == ""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert cpu.alone()


@pytest.mark.parametrize(
    ("model", "batch", "one"),
    [
        (PRESETS["digits"]().model, 128, False),
        (PRESETS["mnist_tutorial"]().model, 128, True),
        (MODELS["vit_small_patch16"], 16, True),
    ],
)
def test_large_steps_have_one_arena(monkeypatch, model, batch, one):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    given = []
    monkeypatch.setattr(cpu, "keep_freed_memory", lambda one_arena: given.append(one_arena))
    cpu.settle(model, batch)
    assert given == [one]
