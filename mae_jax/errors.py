"""Failures that are meant to be read by the person who ran the command."""


class StatedError(RuntimeError):
    """A failure that the program understands: its message names what is wrong, with its value, and what to do.

    The command line prints the message alone and exits with 1. A configuration that cannot work
    raises ValueError instead, when it is built, and the command line exits with 2.
    """


class NoSuchSplitError(StatedError):
    """The data is there, the split of it is not."""
