"""The command line's own process: malloc and XLA where the CPU is alone, compiled programs kept.

A program that calls mae_jax from Python has none of them. scripts/bench_notes.md has what each is worth.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import pwd
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mae_jax.config import ModelConfig

# Parameters of mallopt(3), from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8

HEAP = 64 << 20  # bytes of address space in one of the heaps that a thread's arena in glibc is made of
FITTING = 60 << 20  # bytes that fit there, with what malloc keeps beside them
LARGEST_BLOCK = 2**31 - 1  # bytes; XLA reads the size of a block as an int32, and ends the process where it is larger

# Many products of a step are too small to be cut over threads; large ones run in a library with threads of its own.
# Level 1 compiles in three quarters of the time, and what it compiles is as fast.
XLA_FLAGS = "--xla_cpu_multi_thread_eigen=false", "--xla_backend_optimization_level=1"
# An unknown flag ends the process, so they are given only to versions that have been seen to take them.
FLAGS_KNOWN_TO = ("0.10.", "0.12.")

KEPT_BYTES = 2**30  # of compiled programs; those not used for longest go first
SEVERAL_BLOCKS = "(?s)Error writing persistent compilation cache entry.*Multiple temp buffer allocations"


def set_up(model: "ModelConfig", batch_size: int) -> None:
    """Set up malloc and XLA for steps of this size where the CPU is alone; JAX is not imported yet.

    Through `mae-jax pretrain`, its pipeline included, a step of mnist_tutorial (batch 128) takes two thirds of the CPU
    time and no page faults in place of 20,000.
    """
    if alone():
        largest = largest_buffer(model, batch_size)
        kept = keep_freed_memory(one_arena=largest > FITTING)
        tune_compiler(block=max(largest, FITTING) if kept and largest <= LARGEST_BLOCK else None)


def alone() -> bool:
    """Decide without importing JAX whether it will find the CPU alone."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return True
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def largest_buffer(model: "ModelConfig", batch_size: int) -> int:
    """Return the bytes of the largest array between two operations of a step, if both stacks see every patch."""
    tokens = model.num_patches + int(model.class_token)
    values = [math.prod(model.image_hw) * model.in_channels]
    for stack in (model.encoder, model.decoder):
        values += [tokens * 3 * stack.width, tokens * stack.mlp_width, tokens * tokens * stack.heads]
    return batch_size * max(values) * (8 if model.dtype == "float64" else 4)


def keep_freed_memory(one_arena: bool) -> bool:
    """Let this process keep the memory that it frees, and perhaps have one arena of malloc for all; True if done.

    Otherwise glibc asks the system for a step's memory and gives it back every time: the system then clears each page
    anew. Each thread has an arena of its own, in whose heaps nothing larger than FITTING has a place: where a step
    needs that, all threads must share the first arena, and wait for each other there.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    # No separate mappings; nothing given back, an arena's newest heap neither.
    parameters = [(M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1) if one_arena else (M_TOP_PAD, HEAP)]
    return all([ctypes.CDLL(None).mallopt(*parameter) for parameter in parameters])


def tune_compiler(block: int | None) -> None:
    """Add flags to XLA_FLAGS; one that is there already stays as it is.

    block: XLA asks for a step's memory in blocks of at most so many bytes, or in one where that is None. A single one
      would not fit in a thread's arena, and seldom in the first arena once its memory is in pieces.
    """
    given = os.environ.get("XLA_FLAGS", "").split()
    if given and not given[0].startswith("-"):
        return  # the name of a file of flags
    if not importlib.metadata.version("jaxlib").startswith(FLAGS_KNOWN_TO):
        return
    flags = list(XLA_FLAGS)
    if block is not None:
        flags.append(f"--xla_multiheap_size_constraint_per_heap={block}")
    names = {flag.partition("=")[0] for flag in given}
    os.environ["XLA_FLAGS"] = " ".join(given + [flag for flag in flags if flag.partition("=")[0] not in names])


def keep_programs(least_seconds: float = 0.1) -> Path | None:
    """Keep what is compiled from now on in the user's cache, and use what was kept there.

    JAX's own variables come first: JAX_COMPILATION_CACHE_DIR puts the programs elsewhere, and
    JAX_ENABLE_COMPILATION_CACHE=false keeps none. A folder that cannot be used is no failure. Neither is a program that
    asks for its memory in several blocks (`tune_compiler`), which XLA cannot write: it is compiled again.

    least_seconds: what is compiled faster is not kept.

    Returns:
      the folder; None where nothing can be kept.
    """
    import filelock
    import jax

    if not jax.config.values["jax_enable_compilation_cache"]:
        return None
    warnings.filterwarnings("ignore", SEVERAL_BLOCKS)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
    if jax.config.values["jax_compilation_cache_dir"]:
        return Path(jax.config.values["jax_compilation_cache_dir"])
    try:
        pwd.getpwuid(os.getuid())  # JAX 0.10 asks for the owner of each program when it removes old ones
        folder = programs_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".lockfile", timeout=10):  # JAX's own, held while it reads or writes
            remove_partial(folder)
    except (OSError, RuntimeError, KeyError):  # RuntimeError: there is no home; KeyError: there is no such user
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", KEPT_BYTES)
    return folder


def programs_folder() -> Path:
    """Return the folder for this CPU's programs, since those for one kind of CPU may not run on another."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else [platform.processor()]
    kind = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    return base / "mae_jax" / f"programs-{platform.machine()}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"


def remove_partial(folder: Path) -> None:
    """Remove programs that a process was killed in writing: JAX dates a program after it, in a file beside it.

    One without a date may be cut short, which JAX would warn of at every start, and JAX 0.10 would add nothing more.
    """
    for program in folder.glob("*-cache"):
        if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
            program.unlink()
