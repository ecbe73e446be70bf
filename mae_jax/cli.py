"""The command line: which command, and what becomes of its failures."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

import tyro

from mae_jax.commands.bench import bench
from mae_jax.commands.data import inspect, prepare
from mae_jax.commands.evaluation import features, knn, reconstruct
from mae_jax.commands.port import port
from mae_jax.commands.training import finetune, plan, pretrain, probe
from mae_jax.errors import StatedError
from mae_jax.interruption import STOPPED, end_by_exception


def _tyro_command(function: Callable[..., int]) -> Callable[[Sequence[str], str], int]:
    def command(args: Sequence[str], prog: str) -> int:
        return tyro.cli(function, args=args, prog=prog)

    command.__doc__ = function.__doc__
    return command


COMMANDS: dict[str, Callable[[Sequence[str], str], int]] = {
    "pretrain": pretrain,
    "finetune": finetune,
    "probe": probe,
    "plan": plan,
    "reconstruct": _tyro_command(reconstruct),
    "features": _tyro_command(features),
    "knn": _tyro_command(knn),
    "port": _tyro_command(port),
    "prepare": _tyro_command(prepare),
    "inspect": _tyro_command(inspect),
    "bench": _tyro_command(bench),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 done, 1 a stated failure, 2 wrong usage, 143 or 130 stopped by SIGTERM or Ctrl-C."""
    code = _main(argv)
    if code and "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        _leave(code)  # one of several hosts has failed: at a regular exit it and the others would wait for each other
    return code


def _leave(code: int) -> NoReturn:
    """End the process without what Python does at its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _main(argv: Sequence[str] | None) -> int:
    end_by_exception(signal.SIGINT)
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    summaries = "\n".join(
        f"  {name:12} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()
    )
    parser = argparse.ArgumentParser(
        prog="mae-jax",
        description="Masked Autoencoder pretraining in JAX/Flax.",
        epilog=f"commands:\n{summaries}\n\nmae-jax COMMAND --help tells more; --debug shows tracebacks.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    command = parser.parse_args(words[:1]).command
    try:
        return COMMANDS[command]([word for word in words[1:] if word != "--debug"], f"mae-jax {command}")
    except KeyboardInterrupt:
        _leave(130)  # libraries that were cut off at any place have crashed at a regular exit
    except SystemExit as ended:
        if ended.code == STOPPED:
            _leave(STOPPED)
        raise
    except BrokenPipeError:
        os._exit(1)
    except Exception as error:
        if debug:
            traceback.print_exc()
            return 1
        stated = isinstance(error, StatedError)
        print(
            f"mae-jax: {error}" if stated else f"mae-jax: {type(error).__name__}: {error} (--debug shows where)",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
