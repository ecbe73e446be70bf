"""The command line: which command, and what becomes of its failures."""

import argparse
import contextlib
import errno
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from mae_jax.cli.signals import end_by_exception
from mae_jax.errors import StatedError

Command = Callable[[Sequence[str], str], int]  # flags and the program's name to an exit code

# The module of each command, in mae_jax/cli; the function in it has the command's name.
COMMANDS = {
    "pretrain": "pretrain",
    "finetune": "finetune",
    "probe": "finetune",
    "plan": "plan",
    "reconstruct": "reconstruct",
    "features": "features",
    "knn": "knn",
    "port": "port",
    "prepare": "prepare",
    "inspect": "inspect",
    "bench": "bench",
}


def load(name: str) -> Command:
    """Import one command, and with it only what its flags need."""
    return getattr(importlib.import_module(f"mae_jax.cli.{COMMANDS[name]}"), name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 done, 1 a stated failure, 2 wrong usage, 128 + number where a signal stopped it."""
    _open_standard_streams()
    if threading.current_thread() is threading.main_thread():
        end_by_exception()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        command = _parser(words).parse_args(words[:1]).command
        code = load(command)([word for word in words[1:] if word != "--debug"], f"mae-jax {command}")
        sys.stdout.flush()
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT)  # libraries that were cut off at any place have crashed at a regular exit
    except SystemExit as ended:
        if isinstance(ended.code, int) and ended.code > 128:
            _leave(ended.code)
        raise
    except Exception as error:
        code = _failed(error, debug="--debug" in words)
    if code and "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        _leave(code)  # one of several hosts has failed: at a regular exit it and the others would wait for each other
    return code


def _failed(error: Exception, debug: bool) -> int:
    """Print what went wrong, and return the exit code."""
    if isinstance(error, BrokenPipeError):  # nobody reads on
        _drop_output()
        return 1
    # Files that cannot be written are named where they are; what has no name is the output.
    if isinstance(error, OSError) and error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        _drop_output()
        error = StatedError(f"standard output cannot be written: {error.strerror}", field="stdout")
    if debug:
        traceback.print_exception(error)
        return 1
    stated = isinstance(error, StatedError)
    print(
        f"mae-jax: {error}" if stated else f"mae-jax: {type(error).__name__}: {error} (--debug shows where)",
        file=sys.stderr,
    )
    return 1


class _Parser(argparse.ArgumentParser):
    """A parser whose help is printed, or fails: argparse's own passes over an output that cannot be written."""

    def print_help(self, file: Any = None) -> None:
        """Print the help at once."""
        print(self.format_help(), end="", file=file or sys.stdout, flush=True)


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    epilog = None
    if not words or words[0] not in COMMANDS:  # help, or a wrong word
        lines = [f"  {name:12} {(load(name).__doc__ or '').partition(chr(10))[0]}" for name in COMMANDS]
        epilog = "\n".join(["commands:", *lines, "", "mae-jax COMMAND --help shows more; --debug shows tracebacks."])
    parser = _Parser(
        prog="mae-jax",
        description="Masked Autoencoder pretraining in JAX/Flax.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    return parser


def _drop_output() -> None:
    """Let the rest of the output go nowhere: Python writes it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _leave(code: int) -> NoReturn:
    """End the process without what Python does at its end."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _open_standard_streams() -> None:
    """Put the null device where a standard stream is closed: the next file to be opened would take its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


if __name__ == "__main__":
    sys.exit(main())
