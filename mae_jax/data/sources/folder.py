"""A folder of image files: `ROOT/train/<class>/...`, `ROOT/<class>/...` or flat, any depth."""

import os

import numpy as np
from PIL import Image

from mae_jax.data.images.decode import Picture, decode, open_picture, read_file
from mae_jax.errors import NoSuchSplitError, StatedError

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")


class FolderSource:
    """The image files below a folder, in the order of their paths.

    A file's class is the first folder below the split's folder; files that lie directly in it have label -1.
    The split `train` is ROOT/train, or ROOT itself where that does not exist; any other split must be a folder.
    Paths are held as one string of bytes, so that a million of them reach a worker process in milliseconds.

    Raises:
      StatedError: there is no such folder, or no image in it.
    """

    in_memory = False

    def __init__(self, root: str, mode: str = "RGB", split: str = "train") -> None:
        self._base = _split_folder(root, split)
        self._mode = mode
        paths = sorted(_image_paths(self._base))
        if not paths:
            raise StatedError(
                f"{self._base} has no image files, at any depth, that end in {', '.join(EXTENSIONS)}",
                field="data",
            )
        classes = [path.split(os.sep, 1)[0] if os.sep in path else "" for path in paths]
        self.class_names = tuple(sorted(set(classes) - {""}))
        number = {"": -1} | {name: i for i, name in enumerate(self.class_names)}
        self._labels = np.array([number[name] for name in classes], np.int32)
        encoded = [os.fsencode(path) for path in paths]
        self._paths = b"".join(encoded)
        self._ends = np.cumsum([len(path) for path in encoded])

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, index: int) -> str:
        """Return the path of file `index`."""
        start = self._ends[index - 1] if index else 0
        return os.path.join(self._base, os.fsdecode(self._paths[start : self._ends[index]]))

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def file(self, index: int) -> bytes:
        """Return the contents of file `index`.

        Raises:
          BrokenImage: it cannot be read.
        """
        return read_file(self.name(index))

    def picture(self, index: int) -> Picture:
        """Return image `index`, in this source's mode (`L` or `RGB`), in its own size.

        Raises:
          BrokenImage: there is no such file, or it is not an image.
        """
        return open_picture(self.name(index), self._mode)

    def load(self, index: int) -> Image.Image:
        """Return image `index`, in this source's mode (`L` or `RGB`), in its own size.

        Raises:
          BrokenImage: the file does not decode.
        """
        return decode(self.name(index), self._mode)


def _split_folder(root: str, split: str) -> str:
    root = os.path.abspath(os.path.expanduser(root))
    if not os.path.isdir(root):
        raise StatedError(f"data folder:{root}: there is no such folder", field="data")
    folder = os.path.join(root, split)
    if os.path.isdir(folder):
        return folder
    if split != "train":
        raise NoSuchSplitError(f"data folder:{root} has no split {split!r}: there is no folder {folder}", field="split")
    return root


def _image_paths(base: str) -> list[str]:
    """List paths relative to `base`, in no order. Hidden files and folders are left out; links are followed.

    A link that leads to a folder around it ends there. A dangling link to an image is listed: a file that does not
    decode is reported, one that is not listed would be missed by nobody.
    """
    paths = []
    pending: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(base),))]
    while pending:
        folder, real = pending.pop()  # real: where each link on the way was left, then this folder, without links
        with os.scandir(os.path.join(base, folder)) as entries:
            for entry in entries:
                path = os.path.join(folder, entry.name)
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    if not entry.is_symlink():
                        pending.append((path, (*real[:-1], os.path.join(real[-1], entry.name))))
                    elif not _around(target := os.path.realpath(entry.path), real):
                        pending.append((path, (*real, target)))
                elif entry.name.lower().endswith(EXTENSIONS) and (entry.is_file() or entry.is_symlink()):
                    paths.append(path)
    return paths


def _around(target: str, folders: tuple[str, ...]) -> bool:
    """Return whether `target` is one of the folders or contains one."""
    return any((folder + os.sep).startswith(target.rstrip(os.sep) + os.sep) for folder in folders)
