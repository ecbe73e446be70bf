"""Failures that are meant to be read by the person who ran the command."""

import reprlib
from typing import Any


class StatedError(RuntimeError):
    """A failure that the program understands: its message names what is wrong, with its value, and what to do.

    The command line prints the message alone and exits with 1. A configuration that cannot work
    raises ValueError instead, when it is built, and the command line exits with 2.

    Attributes:
      field: the field, flag, file or key that the message names, without its value (`workdir`, `model.in_channels`,
        `metrics.jsonl`, `pos_embed`); None where it names none. For programs, which should not read sentences.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the field where a worker process raises."""
        return _rebuild, (type(self), str(self), self.field)


def _rebuild(kind: type[StatedError], message: str, field: str | None) -> StatedError:
    return kind(message, field=field)


class NoSuchSplitError(StatedError):
    """The data is there, the split of it is not."""


class _Short(reprlib.Repr):
    """A `repr` that takes no time, whatever it is given: lists are cut in length and in depth."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 2, 4, 4, 3
        self.maxstring, self.maxlong = 80, 40

    def repr_int(self, x: int, level: int) -> str:
        """Return an integer, or its size where Python would refuse to convert it (over 4,300 digits)."""
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"an integer of {x.bit_length()} bits"

    def repr_instance(self, x: Any, level: int) -> str:
        """Return the name of the type where a value's own `repr` could be of any length."""
        return repr(x) if isinstance(x, float | bool | None) else f"a value of type {type(x).__name__}"


def shown(value: Any) -> str:
    """Return a value from a file as a message shows it: like `repr`, cut where it is long, deep or shared."""
    return _Short().repr(value)


def shown_name(name: str) -> str:
    """Return a name from a file as a message shows it: as it is, unless it is long or cannot be printed."""
    return name if name.isprintable() and len(name) <= 120 else shown(name)
