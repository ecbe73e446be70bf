"""Settings of a process that has the CPU alone to compute on; to be made before JAX is imported.

scripts/bench_notes.md has the gain of each.
"""

import ctypes
import importlib.util
import math
import os
import platform

from mae_jax.config import ModelConfig

# Parameters of mallopt(3), from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8

HEAP = 64 << 20  # bytes of address space in one of the heaps that a thread's arena in glibc is made of
FITTING = 60 << 20  # bytes that fit there, with what malloc keeps beside them
LARGEST_BLOCK = 2**31 - 1  # bytes; XLA reads the size of a block as an int32, and ends the process where it is larger

# Many products of a step are too small to be cut over threads; large ones run in a library with threads of its own.
# Level 1 compiles in three quarters of the time, and what it compiles is as fast.
XLA_FLAGS = "--xla_cpu_multi_thread_eigen=false", "--xla_backend_optimization_level=1"


def alone() -> bool:
    """Whether JAX finds the CPU alone, as far as can be told without importing it."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return True
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def largest_buffer(model: ModelConfig, batch_size: int) -> int:
    """Bytes of the largest array between two operations of a step, if every patch is seen by both stacks."""
    tokens = model.num_patches + int(model.class_token)
    values = [math.prod(model.image_hw) * model.in_channels]
    for stack in (model.encoder, model.decoder):
        values += [tokens * 3 * stack.width, tokens * stack.mlp_width, tokens * tokens * stack.heads]
    return batch_size * max(values) * (8 if model.dtype == "float64" else 4)


def settle(model: ModelConfig, batch_size: int) -> None:
    """Make all of these settings, where the CPU is alone, for steps of this size."""
    if alone():
        largest = largest_buffer(model, batch_size)
        kept = keep_freed_memory(one_arena=largest > FITTING)
        tune_compiler(block=max(largest, FITTING) if kept and largest <= LARGEST_BLOCK else None)


def keep_freed_memory(one_arena: bool) -> bool:
    """Let this process keep the memory that it frees, and perhaps have one arena of malloc for all; True if done.

    Otherwise glibc asks the system for a step's memory and gives it back every time: the system then clears each page
    anew, a seventh of a step's time. Each thread has an arena of its own, in whose heaps nothing larger than FITTING
    has a place: where a step needs that, all threads must share the first arena, and wait for each other there, and
    search what the compiler left of it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    # No separate mappings; nothing given back, an arena's newest heap neither.
    settings = [(M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1) if one_arena else (M_TOP_PAD, HEAP)]
    return all([ctypes.CDLL(None).mallopt(*setting) for setting in settings])


def tune_compiler(block: int | None) -> None:
    """Add flags to XLA_FLAGS; one that is there already stays as it is.

    What a step needs between its operations is asked for in blocks of at most `block` bytes, or in one where that is
    None. A single one would not fit in a thread's arena, and seldom in the first arena once its memory is in pieces.
    """
    given = os.environ.get("XLA_FLAGS", "").split()
    if given and not given[0].startswith("-"):
        return  # the name of a file of flags
    flags = list(XLA_FLAGS)
    if block is not None:
        flags.append(f"--xla_multiheap_size_constraint_per_heap={block}")
    names = {flag.partition("=")[0] for flag in given}
    os.environ["XLA_FLAGS"] = " ".join(given + [flag for flag in flags if flag.partition("=")[0] not in names])
