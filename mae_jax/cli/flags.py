"""What several commands share: a configuration read from flags, the run's precision, a progress bar."""

import argparse
import dataclasses
import functools
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import getdoc
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import tyro

if TYPE_CHECKING:
    from mae_jax.config import FinetuneConfig, PretrainConfig
    from mae_jax.runs.loop import Finished


# Flags that stand for a longer one.
ALIASES = {"--precision": "--model.dtype"}

Config = TypeVar("Config", "PretrainConfig", "FinetuneConfig")
Flags = TypeVar("Flags")


def command(function: Callable[..., int]) -> Callable[[Sequence[str], str], int]:
    """Turn a function into a command: its parameters are the flags, its docstring is the help."""

    @functools.wraps(function)
    def run(args: Sequence[str], prog: str) -> int:
        return tyro.cli(function, args=args, prog=prog)

    return run


def read_flags(
    args: Sequence[str],
    prog: str,
    kind: "type[Flags]",
    presets: "Mapping[str, Callable[[], Config]]",
    adopt: "Callable[[Config, str], Config] | None" = None,
) -> "Flags":
    """Read a command line that begins with the name of a preset.

    kind: a dataclass of the configuration's fields and the command's own; all are flags.
    adopt: puts into the preset what the weights say that `--init` names; flags go before it.
    """
    if args and args[0] in presets:
        preset = presets[args[0]]
        words = _unalias(args[1:])
        config = preset()
        if adopt is not None:
            first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            first.add_argument("--init")
            init = first.parse_known_args(words)[0].init
            if init not in (None, "None"):  # None is how the list of flags writes the default
                config = adopt(config, init)
        description = f"{getdoc(preset) or ''}\n\n--precision stands for --model.dtype; --debug shows tracebacks."
        default = kind(**vars(config))
        return tyro.cli(kind, default=default, args=words, prog=f"{prog} {args[0]}", description=description)
    # Help, or a word that is no preset.
    recipes = tyro.extras.subcommand_type_from_defaults(
        {name: kind(**vars(preset())) for name, preset in presets.items()},
        {name: preset.__doc__ or "" for name, preset in presets.items()},
    )
    return tyro.cli(recipes, args=_unalias(args), prog=prog)


def plain(flags: object, kind: "type[Config]") -> "Config":
    """Leave the command's own flags out of a configuration."""
    return kind(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(kind)})


def _unalias(args: Sequence[str]) -> list[str]:
    """Replace short flags by the long ones that they stand for, with and without `=`."""
    split = [arg.partition("=") for arg in args]
    return [ALIASES.get(flag, flag) + equals + value for flag, equals, value in split]


def precision(run: Path) -> str:
    """Read the dtype that a run computes in.

    Raises:
      StatedError: it is neither a run nor a checkpoint.
    """
    from mae_jax.storage.workdir import find_checkpoint, read_record

    return read_record(find_checkpoint(run)).config.model.dtype


def prepare_jax_for(source: str) -> None:
    """Prepare JAX to compute in a run's own precision; anything else is computed in float32.

    Raises:
      StatedError: it is a run that cannot be read.
    """
    from mae_jax.port.read import is_run

    prepare_jax(precision(Path(source)) if is_run(source) else "float32")


def prepare_jax(dtype: str, hosts_may_join: bool = False) -> None:
    """Make the settings that JAX takes before its first array, and refuse platforms that it does not find.

    hosts_may_join: leave the platforms to `hosts.joined`: hosts must meet before JAX looks for devices.
    """
    import jax

    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    if not hosts_may_join:
        from mae_jax.hosts import check_platform

        check_platform()


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar over images, where somebody is looking."""
    from tqdm import tqdm

    with tqdm(total=total, unit="image", unit_scale=True, dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        yield bar.update


def end_run(finished: "Finished", args: Sequence[str], prog: str) -> int:
    """Print how a run ended, and return the exit code for it."""
    print(f"step {finished.step} is saved in {finished.workdir}")
    if finished.signal is None:
        return 0
    print(f"stopped by {finished.signal.name}; to continue: {shlex.join([*prog.split(), *args])}")
    return 128 + finished.signal
