"""Memory of a run that computes on the CPU."""

import ctypes
import importlib.util
import platform

# Parameters of mallopt(3), from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, where JAX has the CPU alone to compute on; True if done.

    A step's activations are one block of gigabytes, which glibc asks the system for and gives back every time: the
    system then clears each page anew, a seventh of a step's time (scripts/bench_notes.md). To be called before JAX is
    imported: its threads would have arenas of their own, which cannot hold such blocks.
    """
    accelerated = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    if accelerated or platform.libc_ver()[0] != "glibc":
        return False
    # One arena, no separate mappings, nothing given back.
    settings = (M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)
    return all([ctypes.CDLL(None).mallopt(*setting) for setting in settings])
