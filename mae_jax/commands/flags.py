"""A run's configuration, read from a preset's name and the flags after it."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from inspect import getdoc
from typing import TYPE_CHECKING, TypeVar

import tyro

if TYPE_CHECKING:
    from mae_jax.config import FinetuneConfig, PretrainConfig

# Flags that stand for a longer one.
ALIASES = {"--precision": "--model.dtype"}

Config = TypeVar("Config", "PretrainConfig", "FinetuneConfig")


def read_config(
    args: Sequence[str],
    prog: str,
    kind: "type[Config]",
    presets: "Mapping[str, Callable[[], Config]]",
    adopt: "Callable[[Config, str], Config] | None" = None,
) -> "Config":
    """The configuration of a command line that begins with the name of a preset.

    adopt: puts into the preset what the weights say that `--init` names; flags go before it.
    """
    if args and args[0] in presets:
        preset = presets[args[0]]
        words = _unalias(args[1:])
        default = preset()
        if adopt is not None:
            first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            first.add_argument("--init")
            if init := first.parse_known_args(words)[0].init:
                default = adopt(default, init)
        description = f"{getdoc(preset)}\n\n--precision stands for --model.dtype; --debug shows tracebacks."
        return tyro.cli(kind, default=default, args=words, prog=f"{prog} {args[0]}", description=description)
    # Help, or a word that is no preset.
    recipes = tyro.extras.subcommand_type_from_defaults(
        {name: preset() for name, preset in presets.items()},
        {name: preset.__doc__ or "" for name, preset in presets.items()},
    )
    return tyro.cli(recipes, args=_unalias(args), prog=prog)


def _unalias(args: Sequence[str]) -> list[str]:
    """Short flags to the long ones that they stand for, with and without `=`."""
    split = [arg.partition("=") for arg in args]
    return [ALIASES.get(flag, flag) + equals + value for flag, equals, value in split]
