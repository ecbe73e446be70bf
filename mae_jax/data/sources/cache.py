"""Files of remote folders that are kept on this disk: each is fetched once for all processes of this machine.

They lie in ~/.cache/mae_jax/records ($XDG_CACHE_HOME in place of ~/.cache), by their SHA-256. MAE_JAX_CACHE_GB is the
most that they may take (10^9 bytes each); by default half of what the disk has for them. The least recently used go
first where room is needed. A file in use is locked by those who read it, and stays.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import filelock

from mae_jax.errors import StatedError
from mae_jax.files import whole

LIMIT = "MAE_JAX_CACHE_GB"
_PARTIAL, _LOCK = ".partial", ".lock"  # a file that is being fetched, and the lock of who fetches it


class Held:
    """A file of the cache that is in use: it stays there until this is closed, or forgotten."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    __del__ = close


def fetch(sha256: str, size: int, get: Callable[[str], None], origin: str) -> Held:
    """Return a file of the cache, fetched by `get(path)` if it is not there.

    Of several processes that want it one fetches it, and the others wait.

    Raises:
      StatedError: what was fetched is not what `sha256` says, or there is no room for its `size` bytes.
    """
    path = _folder() / sha256
    while (held := _hold(path)) is None:
        with filelock.FileLock(f"{path}{_LOCK}"):  # ends with the process that has it, however that ends
            if not path.exists():
                _fetch(path, size, get, origin)
    return held


def check_room(size: int, origin: str) -> None:
    """Refuse, before anything is fetched, files that the cache cannot hold at once, `size` bytes together.

    Raises:
      StatedError: it cannot.
    """
    limit = _limit(_folder())
    if size > limit:
        raise StatedError(
            f"{origin} has {_gigabytes(size)}, and at most {_gigabytes(limit)} are kept in {_folder()}: set {LIMIT} "
            "to more, or XDG_CACHE_HOME to a larger disk, or copy the records to a folder",
            field=LIMIT,
        )


def _fetch(path: Path, size: int, get: Callable[[str], None], origin: str) -> None:
    with whole(path, path.with_name(path.name + _PARTIAL)) as partial:
        _make_room(path.parent, size, origin)
        get(str(partial))
        with partial.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != path.name:
            raise StatedError(
                f"{origin} has SHA-256 {found}, its dataset.json has {path.name}: it was changed or came damaged. "
                "Copy or prepare it again.",
                field="dataset.json",
            )


def _hold(path: Path) -> Held | None:
    """Take a file of the cache into use; None where it is not there."""
    with suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY)
        held = Held(path, descriptor)
        with suppress(OSError):  # a file system without locks: there nothing is removed
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_nlink:  # else it was removed between the two
            with suppress(OSError):
                os.utime(path)
            return held
    return None


def _make_room(folder: Path, size: int, origin: str) -> None:
    """Remove what was used longest ago and is not in use, until `size` bytes more are within the limit."""
    with filelock.FileLock(folder / "room.lock"):
        excess = _used(folder) + size - _limit(folder)
        for path in sorted(_files(folder), key=_last_use):
            if excess <= 0:
                return
            excess -= _remove(path)
    if excess > 0:
        raise StatedError(
            f"{origin} does not fit into {folder}, which may hold {_gigabytes(_limit(folder))} and is in use: set "
            f"{LIMIT} to more, or XDG_CACHE_HOME to a larger disk",
            field=LIMIT,
        )


def _remove(path: Path) -> int:
    """Remove a file if nobody uses it, and return the bytes that this gives."""
    with suppress(OSError, filelock.Timeout):
        size = path.stat().st_size
        if path.suffix == _PARTIAL:  # left by a process that was killed
            with filelock.FileLock(f"{path.with_suffix('')}{_LOCK}", timeout=0):
                path.unlink()
        else:
            with path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        return size
    return 0


def _folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mae_jax" / "records"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _limit(folder: Path) -> float:
    given = os.environ.get(LIMIT)
    if not given:
        return (shutil.disk_usage(folder).free + _used(folder)) / 2
    with suppress(ValueError):
        if float(given) >= 0:
            return float(given) * 1e9
    raise StatedError(f"{LIMIT} {given!r} is no number of gigabytes", field=LIMIT)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix != _LOCK]


def _used(folder: Path) -> int:
    used = 0
    for path in _files(folder):
        with suppress(FileNotFoundError):
            used += path.stat().st_size
    return used


def _last_use(path: Path) -> float:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.3g} GB"
