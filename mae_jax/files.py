"""Files that are there whole or not at all, folders that one process holds, JSON and paths of any origin."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mae_jax.errors import StatedError

if TYPE_CHECKING:
    from PIL import Image

JSON_BYTES = 2**26  # of one file, where the caller gives no other limit

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # of `s3://bucket`, of which a Path keeps one slash

LOCK, LEASE = ".lock", ".lease"
RENEWED, ENDS = 20.0, 90.0  # seconds: how often a lease is renewed, and when one that is not has ended
_LOOK = 1.0  # seconds between two looks at a lease
_NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


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


def sync(path: Path) -> None:
    """Have a file, or a folder's names, on the disk when this returns: a power cut no longer takes them.

    Raises:
      OSError: the disk does not take it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no sync of folders
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Have all files of a folder, and the folder itself, on the disk when this returns; OSError as `sync`."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


@contextlib.contextmanager
def whole(path: Path, beside: Path | None = None) -> Iterator[Path]:
    """Give a path beside the file, of the same ending, to write to; it takes the file's place if the `with` ends well.

    It is on the disk then, also after a power cut. What is left of it where the `with` fails is removed.

    beside: that path, where what a killed process leaves must be known again; by default one of this process alone.
    """
    beside = beside or path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield beside
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # a disk that cannot be written to
            beside.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write text; OSError where that is not possible."""
    with whole(path) as beside:
        beside.write_text(text)


@dataclass(frozen=True)
class Hold:
    """A folder that this process holds.

    Attributes:
      lock: the descriptor of its lock; a child process that is given it (`pass_fds`) holds the folder too.
    """

    folder: Path
    field: str
    lock: int
    holder: str = ""  # what the lease says, where there is one

    def check(self) -> None:
        """Make sure that the folder is still held, before something is written that another process may write too.

        Raises:
          StatedError: this process did not renew its lease in time, and another has taken the folder.
        """
        if self.holder and (found := _holder(self.folder / LEASE)) != self.holder:
            raise StatedError(
                f"{self.field} {self.folder} is no longer held by this process, which was stopped for more than "
                f"{ENDS:.0f} s; {_first_line(found)} has it now",
                field=self.field,
            )


@contextlib.contextmanager
def hold(folder: Path, field: str, report: Callable[[str], None] = print) -> Iterator[Hold]:
    """Hold a folder for this process alone, until the `with` ends.

    By flock, which ends with the process however it ends. Where the file system has none, by a file that is renewed
    every 20 s: one that was not renewed for 90 s does not hold, which is waited for, after a word to `report`.

    Raises:
      StatedError: another process holds it.
      OSError: nothing can be written there.
    """
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    holder = f"process {os.getpid()} on {socket.gethostname()} (since {now})\n{uuid.uuid4().hex}"
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _refusal(folder, field, _holder(folder / LOCK)) from error
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            with _leased(folder, field, holder, report):
                yield Hold(folder, field, lock, holder)
            return
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the words
            os.truncate(lock, 0)
            os.write(lock, holder.encode())
        yield Hold(folder, field, lock)
    finally:
        os.close(lock)


def _holder(file: Path) -> str:
    """Read who holds a folder: a line of words, and a line that is no other process's."""
    with contextlib.suppress(OSError), file.open("rb") as content:
        return content.read(500).decode(errors="replace") or "another process"
    return "another process"


def _first_line(holder: str) -> str:
    return holder.partition("\n")[0]


def _refusal(folder: Path, field: str, holder: str) -> StatedError:
    return StatedError(
        f"{field} {folder} is in use by {_first_line(holder)}: wait for its end, or choose another", field=field
    )


@contextlib.contextmanager
def _leased(folder: Path, field: str, holder: str, report: Callable[[str], None]) -> Iterator[None]:
    """Hold a folder by a lease that a thread renews."""
    _take_lease(folder, field, holder, report)
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(folder / LEASE, holder, ended), name="lease", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        if _holder(folder / LEASE) == holder:
            (folder / LEASE).unlink(missing_ok=True)


def _take_lease(folder: Path, field: str, holder: str, report: Callable[[str], None]) -> None:
    """Make the lease of a folder, where there is one only after it has ended.

    Times are compared with each other alone, never with a clock of this host, which may be another than the server's.
    """
    lease, seen, since, taken_over = folder / LEASE, None, 0.0, False
    while True:
        with contextlib.suppress(FileExistsError):
            with lease.open("x") as file:
                file.write(holder)
            if taken_over:
                time.sleep(_LOOK)  # another that waited too may have taken this one for the one that ended
            if not taken_over or _holder(lease) == holder:
                return
        try:
            found = lease.stat().st_mtime_ns, _holder(lease)
        except FileNotFoundError:
            continue  # given back just now
        if seen is None:
            seen, since = found, time.monotonic()
            report(
                f"{field} {folder} was held by {_first_line(found[1])}; waiting up to {ENDS:.0f} s to see whether it "
                "still is"
            )
        elif found != seen:
            raise _refusal(folder, field, found[1])
        elif time.monotonic() - since > ENDS:
            _remove_lease(lease, seen[1])
            seen, taken_over = None, True
            continue
        time.sleep(_LOOK)


def _remove_lease(lease: Path, ended: str) -> None:
    """Remove a lease that has ended; one that another process has made of it in between is put back."""
    aside = lease.with_name(f"{LEASE}-{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        lease.rename(aside)
        if _holder(aside) != ended:
            with contextlib.suppress(FileExistsError):
                os.link(aside, lease)
        aside.unlink()


def _renew(lease: Path, holder: str, ended: threading.Event) -> None:
    """Renew a lease until the end, or until another process has taken it."""
    while not ended.wait(RENEWED):
        with contextlib.suppress(OSError):  # passing: the next try may succeed in time
            if _holder(lease) != holder:
                return
            os.utime(lease)


def local_path(path: str | Path, field: str) -> Path:
    """Return a path that something is to be written to, as a whole path of this machine.

    Raises:
      StatedError: it is the address of an object store, which would become a folder of a strange name.
    """
    if _ADDRESS.match(str(path)):
        raise StatedError(
            f"{field} {path} is an address, and only this machine's folders can be written to: give a local path, such "
            "as where the bucket is mounted",
            field=field,
        )
    return Path(path).absolute()


def check_place(path: Path, name: str = "out") -> None:
    """Refuse, before any work, a file that could not be written where it is to be.

    Raises:
      StatedError: it is an address or a folder, or its own folder is not there or cannot be written to.
    """
    folder = local_path(path, name).parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise StatedError(
            f"{name} {path} cannot be written: {path.parent} is no folder that can be written to", field=name
        )
    if path.is_dir():
        raise StatedError(f"{name} {path} is a folder: choose another name", field=name)


def check_picture(path: Path, name: str = "out") -> None:
    """Refuse, before any work, a picture that could not be written.

    Raises:
      StatedError: its ending names no picture format, or as `check_place`.
    """
    from PIL import Image  # noqa: PLC0415 - machines for benchmarks have none

    kinds = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    if path.suffix.lower() not in kinds:
        raise StatedError(f"{name} {path} has no ending of a picture, such as .png", field=name)
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
        raise StatedError(f"{name} {path} cannot be written: {reason}", field=name) from error
