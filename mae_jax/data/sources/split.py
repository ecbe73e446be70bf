"""Some images of a source, and the two parts that a classifier is trained and evaluated on."""

from collections.abc import Callable, Sequence

from PIL import Image

from mae_jax.data.images.decode import Picture
from mae_jax.data.sources.source import Source
from mae_jax.errors import NoSuchSplitError, StatedError


class Subset:
    """Those images of a source that `indices` names, in that order."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices
        self.in_memory, self.class_names = source.in_memory, source.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def label(self, index: int) -> int:
        return self.source.label(self.indices[index])

    def file(self, index: int) -> bytes:
        return self.source.file(self.indices[index])

    def picture(self, index: int) -> Picture:
        return self.source.picture(self.indices[index])

    def load(self, index: int) -> Image.Image:
        return self.source.load(self.indices[index])


class Renumbered(Subset):
    """A source whose classes are numbered as those of another one, which has them all, by their names."""

    def __init__(self, source: Source, class_names: tuple[str, ...]) -> None:
        super().__init__(source, range(len(source)))
        self._numbers = [class_names.index(name) for name in source.class_names]
        self.class_names = class_names

    def label(self, index: int) -> int:
        own = super().label(index)
        return own if own < 0 else self._numbers[own]


def split_for_training(open_split: Callable[[str], Source], data: str, holdout: int) -> tuple[Source, Source]:
    """Return the images to train on and those to evaluate on: the splits train and val, with one numbering of classes.

    Where there is no val, every `holdout`-th image of train is kept from training.

    Raises:
      StatedError: there are no two classes, val has one that train has not, or there are too few images.
    """
    train = open_split("train")
    if len(train.class_names) < 2:
        raise StatedError(
            f"data {data} has no classes; a classifier needs two: give a folder of class folders", field="data"
        )
    try:
        val = open_split("val")
    except NoSuchSplitError:
        if len(train) < holdout:
            raise StatedError(
                f"data {data} has {len(train)} images, fewer than holdout {holdout}", field="holdout"
            ) from None
        every = range(len(train))
        return Subset(train, [i for i in every if i % holdout]), Subset(train, every[::holdout])
    if not val.class_names:
        raise StatedError(
            f"val of {data} has no classes: put its images into folders named as those of train", field="data"
        )
    unknown = [name for name in val.class_names if name not in train.class_names]
    if unknown:
        raise StatedError(f"val of {data} has classes that train has not: {', '.join(unknown[:5])}", field="data")
    return train, Renumbered(val, train.class_names)
