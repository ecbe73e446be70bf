"""`mae-jax` in a process that begins with its libraries imported, which take three seconds.

Python's fork server imports them once for a worker of the tests, and forks. What is left out is a process's own
imports and its interpreter's end; tests of those, of signals and of several hosts start processes of their own.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, get_context
from pathlib import Path

import pytest

MODULES = [
    "mae_jax.cli.__main__",
    "mae_jax.cli.pretrain",
    "mae_jax.cli.finetune",
    "mae_jax.runs.pretrain",
    "mae_jax.runs.finetune",
    "mae_jax.evaluation.sheet",
    "mae_jax.evaluation.knn",
    "mae_jax.port.convert",
    "torch",
    "tests.integration.preloaded",
]


def start_server(environment: Mapping[str, str]) -> None:
    """With what JAX reads when it is imported."""
    get_context("forkserver").set_forkserver_preload(MODULES)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        forkserver.ensure_running()


def run(arguments: Sequence[str], environment: Mapping[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `mae-jax ARGUMENTS` to its end; what it says goes by two files in `folder`."""
    files = [folder / name for name in ("out", "err")]
    process = get_context("forkserver").Process(target=_command, args=(arguments, dict(environment), files))
    process.start()
    process.join(300)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"mae-jax {' '.join(arguments)} takes over 300 s: {[file.read_text() for file in files]}")
    out, err = (file.read_text() for file in files)
    return subprocess.CompletedProcess(["mae-jax", *arguments], process.exitcode, out, err)


def _command(arguments: Sequence[str], environment: Mapping[str, str], files: Sequence[Path]) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    warnings.simplefilter("error")
    sys.argv = ["mae-jax", *arguments]
    from mae_jax.cli.__main__ import main  # noqa: PLC0415

    sys.exit(main())
