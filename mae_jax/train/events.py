"""TensorBoard's event files, by its own records and messages, which import no framework.

They are written by the thread that calls: one that writes apart dies unseen where the disk is full.
"""

import contextlib
import io
import os
import socket
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter


class Events:
    """One event file; events of steps after `start`, from before a restart, are hidden by it.

    Every method but `close` raises OSError where the disk takes no more. What was written outlives the process.
    """

    def __init__(self, folder: Path, start: int) -> None:
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self.path = folder / name
        self._writer = RecordWriter(self.path.open("xb"))
        session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        try:
            self._write(event_pb2.Event(file_version="brain.Event:2"))
            self._write(event_pb2.Event(step=start + 1, session_log=session))
        except OSError:
            self.close()
            raise

    def scalar(self, name: str, step: int, value: float) -> None:
        """One number of a step."""
        self._add(step, summary_pb2.Summary.Value(tag=name, simple_value=value))

    def picture(self, name: str, step: int, image: np.ndarray) -> None:
        """One picture of a step: uint8 (height, width, 3)."""
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, format="PNG")
        height, width, _ = image.shape
        picture = summary_pb2.Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=encoded.getvalue()
        )
        self._add(step, summary_pb2.Summary.Value(tag=name, image=picture))

    def _add(self, step: int, value: summary_pb2.Summary.Value) -> None:
        self._write(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=[value])))

    def _write(self, event: event_pb2.Event) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
        self._writer.flush()

    def close(self) -> None:
        """Write what is left, if the disk takes it: metrics.jsonl has the numbers."""
        with contextlib.suppress(OSError):
            self._writer.close()
