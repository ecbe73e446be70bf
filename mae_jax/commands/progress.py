"""A progress bar."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over images, where somebody is looking."""
    from tqdm import tqdm

    with tqdm(total=total, unit="image", unit_scale=True, dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        yield bar.update
