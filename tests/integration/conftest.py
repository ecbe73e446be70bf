"""The real command line in a process of its own, as a user runs it; what it refuses at once, in this one."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest

from mae_jax.cli import process
from mae_jax.cli.__main__ import main
from mae_jax.cli.signals import SIGNALS
from mae_jax.data.images import decode
from tests.quick import as_users_compile, quick

from . import preloaded

Start = Callable[..., subprocess.Popen[str]]
Run = Callable[..., subprocess.CompletedProcess[str]]

# A model that compiles in a second or two.
TINY = [
    "--model.encoder.width=32",
    "--model.encoder.depth=2",
    "--model.decoder.width=16",
    "--model.decoder.depth=1",
    "--model.decoder.heads=2",
    "--batch-size=32",
    "--log-every=1",
    "--reconstruct-every=None",
    "--optim.base-lr=0.02",
    "--optim.warmup-epochs=0.05",
]


def kept_programs(factory: pytest.TempPathFactory) -> dict[str, str]:
    """What makes processes compile each program once for all of the session's workers."""
    base = factory.getbasetemp()
    return {
        "JAX_COMPILATION_CACHE_DIR": str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Start `mae-jax ARGS`.

    Programs are compiled quickly and kept between calls, so that a test costs seconds; or as users compile them.
    """
    kept = kept_programs(tmp_path_factory)

    def call(
        *args: object,
        devices: int = 1,
        cwd: Path = ROOT,
        environment: Mapping[str, str] = MappingProxyType({}),
        program: Sequence[str] = ("-m", "mae_jax.cli"),
        as_users: bool = False,
    ) -> subprocess.Popen[str]:
        settings = as_users_compile() if as_users else os.environ | quick(devices) | kept
        command = [sys.executable, "-W", "error", *program, *map(str, args)]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**settings, "COLUMNS": "200", **environment},
            cwd=cwd,
        )

    return call


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run `mae-jax ARGS` to its end, with the settings of `start`, in a process that need not import its libraries."""
    kept = kept_programs(tmp_path_factory)
    preloaded.start_server(quick(1) | kept)
    folder = tmp_path_factory.mktemp("output")

    def call(*args: object, devices: int = 1) -> subprocess.CompletedProcess[str]:
        environment = os.environ | quick(devices) | kept | {"COLUMNS": "200"}
        return preloaded.run([str(word) for word in args], environment, folder)

    return call


@pytest.fixture(scope="session")
def trained(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 12 steps; tests leave it as it is."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    done = run("pretrain", "digits", *TINY, "--steps=12", "--reconstruct-every=6", f"--workdir={workdir}")
    assert (done.returncode, done.stderr) == (0, "")
    return workdir


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `mae-jax ARGS` in this process, for what is refused before anything is compiled.

    What the command line sets for its own process is left out, and its handlers of signals are undone.
    """
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(process, "set_up", lambda *_: None)
    monkeypatch.setattr(process, "keep_programs", lambda: None)
    monkeypatch.setattr(decode, "prepare_decoder", lambda: None)

    def call(*args: object) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in args]
        with contextlib.ExitStack() as stack:
            for number in SIGNALS:
                stack.callback(signal.signal, number, signal.getsignal(number))
            try:
                code: int | str | None = main(words)
            except SystemExit as ended:
                code = ended.code
        assert isinstance(code, int)
        out, errors = capsys.readouterr()
        return subprocess.CompletedProcess(words, code, out, errors)

    return call
