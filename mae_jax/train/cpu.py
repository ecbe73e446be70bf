"""Settings of a process that has the CPU alone to compute on; to be made before JAX is imported.

scripts/bench_notes.md has the gain of each.
"""

import ctypes
import importlib.util
import os
import platform

from mae_jax.config import ModelConfig
from mae_jax.models.flops import training_flops

# Parameters of mallopt(3), from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8

# Many products of a step are too small to be cut over threads; large ones run in a library with threads of its own.
# Level 1 compiles in three quarters of the time, and what it compiles is as fast.
XLA_FLAGS = "--xla_cpu_multi_thread_eigen=false", "--xla_backend_optimization_level=1"


# Floating-point operations of a step whose activations, 28 to 39 MB a GFLOP in small models, fit in a thread's arena.
SMALL_STEP = 1.5e9


def alone() -> bool:
    """Whether JAX finds the CPU alone, as far as can be told without importing it."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return True
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def settle(model: ModelConfig, batch_size: int) -> None:
    """Make all of these settings, where the CPU is alone, for steps of this size."""
    if alone():
        keep_freed_memory(one_arena=training_flops(model) * batch_size > SMALL_STEP)
        tune_compiler()


def keep_freed_memory(one_arena: bool) -> bool:
    """Let this process keep the memory that it frees, and have one arena of malloc for all threads; True if done.

    A large step's activations are one block of up to gigabytes, which glibc asks the system for and gives back every
    time: the system then clears each page anew, a seventh of a step's time. The arena of a thread cannot hold more than
    64 MB, so large steps need `one_arena`. Small steps are better off without: they ask for little, but often, and
    compiling leaves that one arena in thousands of pieces to search.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    # No separate mappings, nothing given back.
    settings = [(M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), *([(M_ARENA_MAX, 1)] if one_arena else [])]
    return all([ctypes.CDLL(None).mallopt(*setting) for setting in settings])


def tune_compiler() -> None:
    """Add XLA_FLAGS to the environment; a flag that is there already stays as it is."""
    given = os.environ.get("XLA_FLAGS", "")
    missing = [flag for flag in XLA_FLAGS if flag.partition("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()
