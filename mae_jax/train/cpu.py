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


# A step of fewer floating-point operations loses more by searching one arena for memory than by pages cleared anew.
SMALL_STEP = 4e9
SMALL_STEP_ARENAS = 4


def alone() -> bool:
    """Whether JAX finds the CPU alone, as far as can be told without importing it."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return True
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def settle(model: ModelConfig, batch_size: int) -> None:
    """Make all of these settings, where the CPU is alone, for steps of this size."""
    if alone():
        small = training_flops(model) * batch_size < SMALL_STEP
        keep_freed_memory(SMALL_STEP_ARENAS if small else 1)
        tune_compiler()


def keep_freed_memory(arenas: int) -> bool:
    """Let this process keep the memory that it frees, in at most so many arenas of malloc; True if done.

    A large step's activations are one block of gigabytes, which glibc asks the system for and gives back every time:
    the system then clears each page anew, a seventh of a step's time. An arena of a thread's own cannot hold more than
    64 MB, so large steps are given one arena for all. Small steps ask for little, but often, and the compiler leaves
    that one arena in thousands of pieces to search: they are given a few, and compile in them side by side.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    # No separate mappings, nothing given back.
    settings = (M_ARENA_MAX, arenas), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)
    return all([ctypes.CDLL(None).mallopt(*setting) for setting in settings])


def tune_compiler() -> None:
    """Add XLA_FLAGS to the environment; a flag that is there already stays as it is."""
    given = os.environ.get("XLA_FLAGS", "")
    missing = [flag for flag in XLA_FLAGS if flag.partition("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()
