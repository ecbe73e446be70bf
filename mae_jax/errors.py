"""Failures that are meant to be read by the person who ran the command."""


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
