"""The bundled handwritten digits: 1,797 grey images of 8x8, written by 13 people.

Source: UCI Machine Learning Repository, "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak,
1998, https://doi.org/10.24432/C50P49), the test part, as scikit-learn's `load_digits` has it. Licence: CC BY 4.0.
`digits.npz` holds the original values 0 .. 16 and the labels 0 .. 9.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from mae_jax.data.images.decode import Decoded
from mae_jax.errors import NoSuchSplitError

_FILE = Path(__file__).with_name("digits.npz")


class DigitsSource:
    """The digits as uint8 images 0 .. 255, (8, 8, 1) when they become arrays; the only split is `train`.

    Raises:
      NoSuchSplitError: another split is asked for.
    """

    in_memory = True
    class_names = tuple("0123456789")

    def __init__(self, mode: str = "L", split: str = "train") -> None:
        if split != "train":
            raise NoSuchSplitError(
                f"digits has no split {split!r}: all of its 1,797 images are the split 'train'", field="split"
            )
        with np.load(_FILE) as stored:
            self._images = np.rint(stored["images"] * (255 / 16)).astype(np.uint8)
            self._labels = stored["labels"]
        self._mode = mode

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return f"digits[{index}]"

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def file(self, index: int) -> bytes:
        """Return the image as a PNG file."""
        file = io.BytesIO()
        self.load(index).save(file, "PNG")
        return file.getvalue()

    def picture(self, index: int) -> Decoded:
        return Decoded(self.load(index))

    def load(self, index: int) -> Image.Image:
        """Return image `index`, 8x8, in this source's mode (`L` or `RGB`)."""
        image = Image.fromarray(self._images[index])
        return image if self._mode == "L" else image.convert(self._mode)
