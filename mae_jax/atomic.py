"""A file whole or not at all."""

import contextlib
import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all; what is left of it where that raises OSError is removed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text)
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):  # a disk that cannot be written to
            beside.unlink(missing_ok=True)
        raise
