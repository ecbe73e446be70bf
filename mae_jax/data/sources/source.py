"""Where images come from: what every source gives, and a source by its name."""

import os
from typing import Protocol, runtime_checkable

from PIL import Image

from mae_jax.data.images.decode import Picture, mode_for
from mae_jax.errors import StatedError


@runtime_checkable
class Source(Protocol):
    """Numbered images. A source is sent to worker processes, so it can be pickled and is small."""

    in_memory: bool  # reading costs so little that worker processes would not pay
    class_names: tuple[str, ...]  # empty where there are no classes

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return what a person would call the image: its path, or `digits[17]`."""

    def label(self, index: int) -> int:
        """Return the image's class as an index into `class_names`, or -1."""

    def file(self, index: int) -> bytes:
        """Return the image's file as it is; a PNG file for an image that comes from none.

        Raises:
          BrokenImage: it cannot be read.
        """

    def picture(self, index: int) -> Picture:
        """Return the image in its own size, mode `L` or `RGB`, decoded when its pixels are asked for.

        Raises:
          BrokenImage: there is no image.
        """

    def load(self, index: int) -> Image.Image:
        """Return the same image, decoded.

        Raises:
          BrokenImage: it does not decode.
        """


def absolute(spec: str) -> str:
    """Name the same source from whatever folder it is opened: `folder:photos` becomes `folder:/home/me/photos`."""
    kind, _, path = spec.partition(":")
    local = kind in ("folder", "records") and path and "://" not in path
    return f"{kind}:{os.path.abspath(os.path.expanduser(path))}" if local else spec


def open_source(spec: str, in_channels: int, split: str = "train") -> Source:
    """Open the source that `spec` names, as grey (1) or RGB (3) images.

    `digits`, `folder:PATH`, `tfds:NAME[@SPLIT]` or `records:ADDRESS`. Each kind is imported when it is asked for.

    Raises:
      StatedError: there is no such source, split or folder, or files cannot give `in_channels` channels.
    """
    mode = mode_for(in_channels)
    kind, _, path = spec.partition(":")
    if spec == "digits":
        from mae_jax.data.sources.digits import DigitsSource

        return DigitsSource(mode, split)
    if kind == "folder" and path:
        from mae_jax.data.sources.folder import FolderSource

        return FolderSource(path, mode, split)
    if kind == "records" and path:
        from mae_jax.data.sources.records import RecordSource

        return RecordSource(path, mode, split)
    if kind == "tfds" and path:
        from mae_jax.data.sources.tfds import TfdsSource

        return TfdsSource(path, mode, split)
    raise StatedError(
        f"data {spec!r} is not known: give digits, or folder:PATH for a folder of images, tfds:NAME for a dataset of "
        "TensorFlow Datasets, or records:PATH for what `mae-jax prepare` made",
        field="data",
    )
