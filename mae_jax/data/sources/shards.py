"""A folder on this disk or anywhere that fsspec reaches (`gs://`, `s3://`, `memory://` ...): whole files in and out."""

import copy
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mae_jax.errors import StatedError


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
            raise StatedError(f"{address}: {error}") from error
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def within(self, folder: str) -> "Storage":
        """A folder in this one."""
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
            raise StatedError(f"{self.address} cannot be made a folder: {why}. Choose another.") from error

    def has(self, name: str) -> bool:
        return self._fs.exists(self._path(name))

    def names(self) -> list[str]:
        """Files that are there."""
        if not self._fs.isdir(self._folder):
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._folder, detail=False)]

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where there is none."""
        return self._fs.size(self._path(name)) if self.has(name) else None

    def read(self, name: str) -> bytes:
        return self._fs.cat_file(self._path(name))

    def write(self, name: str, content: bytes) -> None:
        with self.new_file(name) as path:
            path.write_bytes(content)

    def remove(self, name: str) -> None:
        self._fs.rm_file(self._path(name))

    @contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """A path on this disk to write to; the file gets its name and place when the `with` ends without an error.

        Raises:
          StatedError: it cannot be written.
        """
        with tempfile.TemporaryDirectory() as elsewhere:
            path = Path(self._folder if self.is_local else elsewhere, f".{name}.partial")
            try:
                yield path
                if self.is_local:
                    os.replace(path, self._path(name))
                else:
                    self._fs.put_file(str(path), self._path(name))
            except StatedError:
                raise
            except (OSError, RuntimeError) as error:  # the latter is ArrayRecord's for a full disk
                reason = _reason(error) if isinstance(error, OSError) else str(error).partition(";")[0]
                raise StatedError(
                    f"{self._path(name)} cannot be written: {reason}. Make room there, or choose another folder."
                ) from error
            finally:
                with suppress(FileNotFoundError):
                    path.unlink()

    def on_disk(self, name: str, sha256: str) -> str:
        """The path of a file, fetched into the cache first if it is elsewhere.

        Raises:
          StatedError: what was fetched is not what `sha256` says.
        """
        if self.is_local:
            return self._path(name)
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mae_jax" / "records"
        path = cache / sha256
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            # Under a name of its own, since other workers fetch at the same time.
            handle, partial = tempfile.mkstemp(dir=cache)
            os.close(handle)
            try:
                self._fs.get_file(self._path(name), partial)
                if (found := file_sha256(partial)) != sha256:
                    raise StatedError(
                        f"{self._path(name)} has SHA-256 {found}, its dataset.json says {sha256}: it was changed or "
                        "came damaged. Copy or prepare it again."
                    )
                os.replace(partial, path)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(partial)
        return str(path)

    def _path(self, name: str) -> str:
        return f"{self._folder.rstrip('/')}/{name}"


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno is not None else str(error)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file on this disk, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
