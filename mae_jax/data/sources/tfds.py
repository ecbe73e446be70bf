"""Datasets by their name in TensorFlow Datasets, as files of ArrayRecord on this disk, read without TensorFlow.

Images come as the bytes that are stored, undecoded; features other than the image and the class are not parsed.
"""

import os
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import read_only_builder, registered

from mae_jax.data.images.decode import Picture, open_picture
from mae_jax.errors import NoSuchSplitError, StatedError

_FORMAT = "array_record"
_HELD_OUT = ("val", "validation", "test")  # what datasets call the split that this project calls `val`


class TfdsSource:
    """`NAME[/CONFIG][:VERSION][@SPLIT]`: the images of a split in TFDS's own syntax, such as `train[:1%]`.

    It is looked for where TFDS_DATA_DIR says, by default ~/tensorflow_datasets. The image is the feature `image`, or
    the only one of its kind; the class is the feature `label`, or the only one. Without SPLIT the split that is asked
    for is read; `val` is then the first that there is of val, validation, test.

    Raises:
      StatedError: it is not there, cannot be read at random, or has no such split or no image.
    """

    in_memory = False

    def __init__(self, spec: str, mode: str = "RGB", split: str = "train") -> None:
        self._name, _, given = spec.partition("@")
        self._mode = mode
        self._data_dir = _data_dir()
        builder = self._builder()
        self._split = (
            given if given and split == "train" else _choose_split(self._name, list(builder.info.splits), split)
        )
        features = builder.info.features
        image = _feature(features, "image", "Image")
        if image is None:
            raise StatedError(
                f"data tfds:{self._name} has no feature that is an image, or several and none named 'image'",
                field="data",
            )
        self._image = image
        self._label = _feature(features, "label", "ClassLabel")
        self.class_names = tuple(features[self._label].names) if self._label else ()
        self._last: tuple[int, dict[str, Any]] | None = None
        self._opened: tuple[Any, Any, Any] | None = None
        try:
            self._count = len(self._open(builder)[0])
        except ValueError as error:
            raise StatedError(f"data tfds:{spec}: {error}", field="data") from error
        if not self._count:
            raise StatedError(f"data tfds:{self._name}: the split {self._split} has no images", field="split")

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        return f"tfds:{self._name}@{self._split}, record {index}"

    def label(self, index: int) -> int:
        return int(self._record(index)[self._label]) if self._label else -1

    def file(self, index: int) -> bytes:
        """Return the bytes that are stored."""
        return self._record(index)[self._image]

    def picture(self, index: int) -> Picture:
        """Return image `index`, in its own size.

        Raises:
          BrokenImage: it is not an image.
        """
        return open_picture(self.file(index), self._mode, self.name(index))

    def load(self, index: int) -> Image.Image:
        """Return the same image, decoded.

        Raises:
          BrokenImage: it does not decode.
        """
        return self.picture(index).image()

    def _record(self, index: int) -> dict[str, Any]:
        last = self._last  # an image and its label are asked for one after the other
        if last is None or last[0] != index:
            records, features, decoders = self._opened or self._open(self._builder())
            self._last = last = (index, features.deserialize_example_np(records[index], decoders=decoders))
        return last[1]

    def _builder(self) -> tfds.core.DatasetBuilder:
        try:
            builder = read_only_builder.builder_from_files(self._name, data_dir=self._data_dir)
        except registered.DatasetNotFoundError as error:
            raise StatedError(
                f"data tfds:{self._name} is not in {self._data_dir}. Prepare it with `{self._build_command()}` (which "
                "needs TensorFlow, here or on another machine), or name its folder in TFDS_DATA_DIR.",
                field="data",
            ) from error
        except ValueError as error:
            raise StatedError(
                f"data tfds:{self._name} is no name of a dataset: give NAME, NAME/CONFIG or NAME:VERSION",
                field="data",
            ) from error
        found = builder.info.file_format
        if found is None or found.value != _FORMAT:
            raise StatedError(
                f"data tfds:{self._name} is in {self._data_dir} as {found.value if found else 'unknown files'}, which "
                f"cannot be read in any order. Write it anew as ArrayRecord: `{self._build_command()} --overwrite` "
                "(which needs TensorFlow, here or on another machine).",
                field="data",
            )
        return builder

    def _build_command(self) -> str:
        return f"tfds build {self._name} --file_format={_FORMAT} --data_dir={self._data_dir}"

    def _open(self, builder: tfds.core.DatasetBuilder) -> tuple[Any, Any, Any]:
        records = builder.as_data_source(split=self._split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        wanted = [self._image] + ([self._label] if self._label else [])
        features = tfds.features.FeaturesDict({key: builder.info.features[key] for key in wanted})
        self._opened = records, features, {self._image: tfds.decode.SkipDecoding()}
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None, "_last": None}  # a worker process opens the files itself


def _data_dir() -> str:
    return os.path.abspath(os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))


def _choose_split(name: str, found: list[str], wanted: str) -> str:
    if wanted.partition("[")[0] in found:
        return wanted
    candidates = [split for split in _HELD_OUT if wanted == "val" and split in found]
    if not candidates:
        raise NoSuchSplitError(f"data tfds:{name} has no split {wanted!r}; it has {', '.join(found)}", field="split")
    return candidates[0]


def _feature(features: Any, preferred: str, kind: str) -> str | None:
    """Return the top-level feature that is a TFDS `kind`: `preferred`, or the only one."""
    found = [key for key, feature in dict(features).items() if type(feature).__name__ == kind]
    return preferred if preferred in found else found[0] if len(found) == 1 else None
