"""A file whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mae_jax.errors import StatedError

if TYPE_CHECKING:
    from PIL import Image


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside the file, of the same ending, to write to; it takes the file's place if the `with` ends well.

    What is left of it where it does not is removed.
    """
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):  # a disk that cannot be written to
            beside.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write text; OSError where that is not possible."""
    with whole(path) as beside:
        beside.write_text(text)


def check_place(path: Path, name: str = "out") -> None:
    """Refuse, before any work, a file that could not be written where it is to be.

    Raises:
      StatedError: it is a folder, or its own folder is not there or cannot be written to.
    """
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise StatedError(f"{name} {path} cannot be written: {path.parent} is no folder that can be written to")
    if path.is_dir():
        raise StatedError(f"{name} {path} is a folder: choose another name")


def check_picture(path: Path, name: str = "out") -> None:
    """Refuse, before any work, a picture that could not be written.

    Raises:
      StatedError: its ending names no picture format, or as `check_place`.
    """
    from PIL import Image  # noqa: PLC0415 - machines for benchmarks have none

    kinds = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    if path.suffix.lower() not in kinds:
        raise StatedError(f"{name} {path} has no ending of a picture, such as .png")
    check_place(path, name)


def save_picture(picture: "Image.Image", path: Path, name: str = "out") -> None:
    """Write a picture; the file's ending says which kind.

    Raises:
      StatedError: the ending names no picture format, or the folder cannot be written to; `name` is the file's there.
    """
    try:
        with whole(path) as beside:
            picture.save(beside)
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StatedError(f"{name} {path} cannot be written: {reason}") from error
