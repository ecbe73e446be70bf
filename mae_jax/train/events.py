"""TensorBoard's event files, written by the thread that calls.

tensorboardX writes in a thread of its own: where the disk is full that thread dies, and the run then waits for it for
ever at the eleventh event.
"""

import contextlib
import time
from pathlib import Path

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

FLUSH_EVERY = 120.0  # seconds; each flush waits for the disk


class Events:
    """One event file; events of steps after `start`, from before a restart, are hidden by it."""

    def __init__(self, folder: Path, start: int) -> None:
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._flushed = 0.0
        session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(event_pb2.Event(step=start + 1, session_log=session))

    def scalar(self, name: str, step: int, value: float) -> None:
        """One number of a step."""
        self._add(step, summary.scalar(name, value))

    def picture(self, name: str, step: int, image: np.ndarray) -> None:
        """One picture of a step: uint8 (height, width, 3)."""
        self._add(step, summary.image(name, image, dataformats="HWC"))

    def _add(self, step: int, content: summary_pb2.Summary) -> None:
        self._write(event_pb2.Event(step=step, summary=content))

    def _write(self, event: event_pb2.Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
        if event.wall_time - self._flushed > FLUSH_EVERY:
            self._writer.flush()
            self._flushed = event.wall_time

    def close(self) -> None:
        """Write what is left, if the disk takes it: metrics.jsonl has the numbers."""
        with contextlib.suppress(OSError):
            self._writer.close()
