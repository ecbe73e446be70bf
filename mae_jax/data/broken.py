"""Files that do not decode: named once, counted, and too many to go on."""

from collections.abc import Callable

import numpy as np

from mae_jax.data.decoding import BrokenImage
from mae_jax.data.sources import Source
from mae_jax.errors import StatedError


class BrokenFiles:
    """Keeps the account of a run's broken files from the batches' `broken` arrays, in the main process.

    Each file is told to `report` once, however often it comes up. The account starts anew when a run continues.
    """

    def __init__(self, source: Source, report: Callable[[str], None]) -> None:
        self._source = source
        self._report = report
        self._reasons: dict[int, str] = {}
        self.limit = max(10, len(source) // 1000)  # 0.1 % of an epoch

    @property
    def count(self) -> int:
        """Distinct files so far."""
        return len(self._reasons)

    def update(self, broken: np.ndarray) -> None:
        """Take in a batch's `broken`: int64 (batch,), the source's index of each file that was replaced, else -1.

        Raises:
          StatedError: more files are broken than `limit`.
        """
        for index in broken[broken >= 0].tolist():
            if index not in self._reasons:
                self._reasons[index] = reason = self._describe(index)
                self._report(f"{reason}; the next image in the stream takes its place")
        if self.count > self.limit:
            first = "; ".join(list(self._reasons.values())[:3])
            raise StatedError(
                f"{self.count} of {len(self._source):,} images are broken, more than the {self.limit} that are "
                f"passed over: {first}. Remove or repair them, or check that the disk can be read."
            )

    def _describe(self, index: int) -> str:
        # The worker that met the file has only its index to send; a second try here finds the reason.
        try:
            self._source.load(index)
        except BrokenImage as error:
            return str(error)
        return f"{self._source.name(index)} did not decode, though it does now"
