"""What a run reports while it goes: metrics.jsonl, TensorBoard events, and a progress bar or plain lines."""

import contextlib
import io
import json
import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from mae_jax.errors import StatedError
from mae_jax.files import write_atomically
from mae_jax.storage.workdir import METRICS_FILE


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
        """Write one number of a step."""
        self._add(step, summary_pb2.Summary.Value(tag=name, simple_value=value))

    def picture(self, name: str, step: int, image: np.ndarray) -> None:
        """Write one picture of a step: uint8 (height, width, 3)."""
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


EVENTS = "tensorboard"

# Of a row's values, those worth a place on the screen, and what they are called there.
SHOWN = {
    "loss": "loss",
    "learning_rate": "lr",
    "images_per_second": "images/s",
    "data_wait": "waiting",
    "top1": "top-1",
    "top5": "top-5",
    "best_base_lr": "of base_lr",
}


def print_line(text: str) -> None:
    """Print a line for whoever watches; a terminal that is gone, or a full disk behind it, does not stop a run."""
    with contextlib.suppress(OSError, ValueError):  # the latter where it was closed
        print(text, flush=True)


class SilentLog:
    """The log of hosts that do not write: only what concerns that host."""

    def __init__(self, host: int) -> None:
        self._host = host

    def step_done(self) -> None:
        """Do nothing."""

    def row(self, step: int, values: dict[str, float]) -> None:
        """Do nothing."""

    def picture(self, name: str, step: int, image: np.ndarray) -> None:
        """Do nothing."""

    def message(self, text: str) -> None:
        """Print a line that names the host."""
        print_line(f"host {self._host}: {text}")

    def sync(self) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing."""


class RunLog:
    """Writes rows and pictures of the steps after `start`; rows of later steps, from before a restart, are dropped.

    Raises:
      StatedError: the rows that are there cannot be read or written anew, or there is no place for an event file.
    """

    def __init__(self, workdir: Path, start: int, stop: int, every: int = 1) -> None:
        """Begin after the step `start`; `every`: the steps between two rows, of which missing ones are named."""
        file = workdir / METRICS_FILE
        rows: list[dict[str, float]] = []
        doubled: list[int] = []
        missing: list[int] = []
        if start or file.exists():  # a new run has none to read back
            from mae_jax.runs.metrics import missing_steps, once_each, read_metrics  # noqa: PLC0415

            rows, doubled = once_each([row for row in read_metrics(workdir) if row["step"] <= start])
            missing = missing_steps(rows, start, every)
        try:
            write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))
            self._file = file.open("a", buffering=1)
        except OSError as error:
            raise self._unwritable(file, error) from error
        try:
            self._events = Events(workdir / EVENTS, start)
        except OSError as error:
            self._file.close()
            raise StatedError(
                f"no event file can be made in {workdir / EVENTS}: {error.strerror}. Make room there, or make that "
                "a folder that can be written to, and run the same command again.",
                field=EVENTS,
            ) from error
        self._stop = stop
        self._began = time.monotonic(), start
        self._bar = None
        if sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty():
            self._bar = tqdm(initial=start, total=stop, unit="step", dynamic_ncols=True)
        if doubled:
            self.message(f"WARNING: {file} had more than one row of {_steps(doubled)}: the last of each is kept")
        if missing:
            self.message(f"WARNING: {file} has no row of {_steps(missing)}, which came before step {start}")

    @staticmethod
    def _unwritable(file: Path | str, error: OSError) -> StatedError:
        return StatedError(
            f"{file} cannot be written: {error.strerror}. Make room there, or make it writable, and run the same "
            "command again.",
            field=Path(file).name if Path(file).name == METRICS_FILE else EVENTS,
        )

    def step_done(self) -> None:
        """Move the progress bar on by one step."""
        if self._bar is not None:
            self._bar.update()

    def row(self, step: int, values: dict[str, float]) -> None:
        """Write one object into metrics.jsonl, its numbers into the event file, and a line for whoever watches.

        Raises:
          StatedError: one of the files cannot be written.
        """
        file = self._file.name
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            file = str(self._events.path)
            for name, value in values.items():
                self._events.scalar(name, step, value)
        except OSError as error:
            raise self._unwritable(file, error) from error
        shown = {SHOWN[name]: f"{value:.4g}" for name, value in values.items() if name in SHOWN}
        if self._bar is not None:
            self._bar.set_postfix(shown)
        else:
            print_line(f"step {step}/{self._stop}  " + "  ".join(map(" ".join, shown.items())) + self._eta(step))

    def sync(self) -> None:
        """Have all rows on the disk when this returns: a checkpoint is not to survive a power cut without them.

        Raises:
          StatedError: the disk does not take them.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(self._file.name, error) from error

    def _eta(self, step: int) -> str:
        began, start = self._began
        seconds = round((time.monotonic() - began) / max(1, step - start) * (self._stop - step))
        return f"  ETA {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def picture(self, name: str, step: int, image: np.ndarray) -> None:
        """Write a picture, uint8 (height, width, 3), into the event file."""
        with contextlib.suppress(OSError):  # the next row fails too and is reported; a picture is not worth a run
            self._events.picture(name, step, image)

    def message(self, text: str) -> None:
        """Print a line, beside the progress bar where there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print_line(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        self._events.close()
        with contextlib.suppress(OSError):  # of a row that could not be written, which has been reported
            self._file.close()


def _steps(steps: list[int]) -> str:
    """Word some of many steps."""
    rest = f" and {len(steps) - 5:,} more" if len(steps) > 5 else ""
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps[:5]))}{rest}"


Log = RunLog | SilentLog
