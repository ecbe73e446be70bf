"""SIGTERM and Ctrl-C end a run between two steps, not inside one."""

import os
import signal
from types import FrameType, TracebackType
from typing import Self

from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While entered, remembers the first SIGTERM or Ctrl-C; a second one ends the process at once, as ever.

    On several hosts SIGTERM is left to JAX's preemption service, which makes one host's signal known to all and finds
    a step that none of them has passed; Ctrl-C on one of them is the same as SIGTERM there.
    """

    def __init__(self, hosts: int = 1) -> None:
        self.signal: signal.Signals | None = None
        self._several = hosts > 1
        self._before: dict[signal.Signals, signal.Handlers] = {}

    def __enter__(self) -> Self:
        taken = (signal.SIGINT,) if self._several else SIGNALS
        self._before = {number: signal.signal(number, self._remember) for number in taken}  # type: ignore[misc]
        return self

    def after(self, step: int) -> bool:
        """Whether to stop after this step. On several hosts: all ask it once of each step, all get one answer."""
        if self._several and multihost_utils.reached_preemption_sync_point(step):
            self.signal = self.signal or signal.SIGTERM
            return True
        return not self._several and self.signal is not None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
