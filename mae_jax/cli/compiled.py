"""Compiled programs, kept between runs by JAX's own cache: a run that starts again compiles only what is not kept.

JAX_COMPILATION_CACHE_DIR puts them elsewhere, JAX_ENABLE_COMPILATION_CACHE=false switches this off. A program that
asks for its memory in several blocks (`cpu.tune_compiler`) cannot be kept, and is compiled again.
"""

import hashlib
import os
import platform
import warnings
from pathlib import Path

import jax

SEVERAL_BLOCKS = "(?s)Error writing persistent compilation cache entry.*Multiple temp buffer allocations"


def default_folder() -> Path:
    """In the user's cache; of the CPU's own, since programs for one kind of CPU may not run on another."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else [platform.processor()]
    kind = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    return base / "mae_jax" / f"compiled-{platform.machine()}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"


def keep_compiled() -> Path | None:
    """Keep what is compiled from now on, and use what was kept; the folder, or None where nothing can be kept.

    What the environment says is done; a folder that cannot be written to is no failure.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return None
    warnings.filterwarnings("ignore", SEVERAL_BLOCKS)
    if jax.config.values["jax_compilation_cache_dir"]:
        return Path(jax.config.values["jax_compilation_cache_dir"])
    try:
        folder = default_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return folder
