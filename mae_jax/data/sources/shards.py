"""A folder on this disk or anywhere that fsspec reaches (`gs://`, `s3://`, `memory://` ...): whole files in and out."""

import copy
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mae_jax.errors import StatedError
from mae_jax.files import whole


class OnDisk(NamedTuple):
    """A file on this disk."""

    path: str
    held: object  # of a file in the cache, which stays there for as long as this lives


class Storage:
    """Files of one folder by their names. A file is there whole or not at all.

    Raises:
      StatedError: fsspec does not know the kind of address, or lacks the package for it.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        try:
            self._fs, self._folder = fsspec.core.url_to_fs(os.path.expanduser(address))
        except (ValueError, ImportError) as error:
            raise StatedError(f"{address}: {error}", field="data") from error
        self.is_local = isinstance(self._fs, LocalFileSystem)

    @property
    def folder(self) -> Path:
        """Return the folder's path, where it is on this disk."""
        return Path(self._folder)

    def within(self, folder: str) -> "Storage":
        """Return a folder in this one."""
        inner = copy.copy(self)
        inner.address, inner._folder = f"{self.address.rstrip('/')}/{folder}", self._path(folder)
        return inner

    def make(self) -> None:
        """Make the folder, and those around it.

        Raises:
          StatedError: there is a file in the way, or nothing may be written there.
        """
        try:
            self._fs.makedirs(self._folder, exist_ok=True)
        except OSError as error:
            why = "a file has that name" if isinstance(error, FileExistsError) else _reason(error)
            raise StatedError(
                f"{self.address} cannot be made a folder: {why}. Choose another.", field="destination"
            ) from error

    def has(self, name: str) -> bool:
        return self._fs.exists(self._path(name))

    def names(self) -> list[str]:
        """Return the names of the files that are there."""
        if not self._fs.isdir(self._folder):
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._folder, detail=False)]

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, or None where there is none."""
        return self._fs.size(self._path(name)) if self.has(name) else None

    def leads_out(self, name: str) -> bool:
        """Return whether a name is none of a file in this folder: a path, or a link to something elsewhere."""
        if not name or name.startswith(".") or set(name) & set("/\\\0"):
            return True
        return self.is_local and Path(os.path.realpath(self._path(name))).parent != Path(os.path.realpath(self._folder))

    def read(self, name: str, limit: int = 2**26) -> bytes:
        """Read a file of at most `limit` bytes.

        Raises:
          OSError: it cannot be read, or is not there.
          StatedError: it is larger, or no file but a device or a pipe.
        """
        path = self._path(name)
        if self.is_local and os.path.exists(path) and not os.path.isfile(path):
            raise StatedError(f"{path} is not read: it is no regular file", field=name)
        if (self.size(name) or 0) > limit:
            raise StatedError(f"{path} is not read: it has more than {limit:,} bytes", field=name)
        return self._fs.cat_file(path)

    def write(self, name: str, content: bytes) -> None:
        """Write a file; StatedError as `new_file`."""
        with self.new_file(name) as path:
            path.write_bytes(content)

    def create(self, name: str, content: bytes) -> None:
        """Write a file that nobody else has written.

        Raises:
          FileExistsError: it is there already.
          StatedError: it cannot be written.
        """
        try:
            self._fs.pipe_file(self._path(name), content, mode="create")
        except FileExistsError:
            raise
        except OSError as error:
            raise self._unwritten(name, _reason(error)) from error

    def remove(self, name: str) -> None:
        self._fs.rm_file(self._path(name))

    @contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """Give a path on this disk to write to; the file gets its name and place when the `with` ends without an error.

        Raises:
          StatedError: it cannot be written.
        """
        if self.is_local:
            # Always the same: what a killed process left there is written over.
            with self._stated(name), whole(self.folder / name, self.folder / f".{name}.partial") as path:
                yield path
        else:
            with tempfile.TemporaryDirectory() as elsewhere, self._stated(name):
                path = Path(elsewhere, name)
                yield path
                self._fs.put_file(str(path), self._path(name))

    def on_disk(self, name: str, sha256: str, size: int) -> OnDisk:
        """Return where a file of `size` bytes is on this disk; one that is elsewhere is fetched into the cache first.

        Raises:
          StatedError: what was fetched is not what `sha256` says, or the cache has no room for it.
        """
        if self.is_local:
            return OnDisk(self._path(name), None)
        from mae_jax.data.sources.cache import fetch  # noqa: PLC0415 - nothing is fetched that is here

        held = fetch(sha256, size, lambda path: self._fs.get_file(self._path(name), path), self._path(name))
        return OnDisk(str(held.path), held)

    def _path(self, name: str) -> str:
        return f"{self._folder.rstrip('/')}/{name}"

    @contextmanager
    def _stated(self, name: str) -> Iterator[None]:
        """State in a sentence that a file cannot be written."""
        try:
            yield
        except StatedError:
            raise
        except (OSError, RuntimeError) as error:  # the latter is ArrayRecord's for a full disk
            reason = _reason(error) if isinstance(error, OSError) else str(error).partition(";")[0]
            raise self._unwritten(name, reason) from error

    def _unwritten(self, name: str, reason: str) -> StatedError:
        return StatedError(
            f"{self._path(name)} cannot be written: {reason}. Make room there, or choose another folder.",
            field="destination",
        )


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno is not None else str(error)


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file on this disk, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
