"""A file whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mae_jax.errors import StatedError

if TYPE_CHECKING:
    from PIL import Image


JSON_BYTES = 2**26  # of one file: that of a dataset of fourteen million names has more, and is given its own limit


def parse_json(content: bytes, origin: object, field: str | None = None) -> Any:
    """Parse JSON that may come from anywhere; its size is bounded by whoever read it.

    Raises:
      StatedError: it is not JSON, or nested too deep, or has a number of too many digits; `origin` names its place in
        the message, `field` in the error.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise StatedError(f"{origin} is not used: its JSON is nested too deep", field=field) from error
    except ValueError as error:  # not UTF-8, not JSON, or an integer of more digits than Python converts
        raise StatedError(f"{origin} is not JSON: {str(error)[:200]}", field=field) from error


def read_json(path: Path, field: str | None = None, limit: int = JSON_BYTES) -> Any:
    """Read a JSON file of at most `limit` bytes that may come from anywhere.

    Raises:
      StatedError: it is larger, or as `parse_json`.
      OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise StatedError(f"{path} is not used: it has more than {limit:,} bytes", field=field)
    return parse_json(content, path, field)


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
