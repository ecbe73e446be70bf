"""How a run is asked to stop: between two steps, with a checkpoint."""

import os
import signal
import threading
from pathlib import Path

from mae_jax.storage.workdir import checkpoint_folders


class StopRequest:
    """A request to stop a run after the step under way, made from any thread; it installs no handler of signals.

    On several hosts it is passed on as SIGTERM to JAX's preemption service, which knows that signal alone, makes one
    host's known to all and finds a step that none of them has passed.

    Attributes:
      signal: what asked, once something has.
      step: the step under way; None before the first.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.step: int | None = None
        self._workdir: Path | None = None
        self._several = self._passed_on = False
        self._lock = threading.Lock()

    def request(self, number: signal.Signals = signal.SIGTERM) -> bool:
        """Ask the run to stop; False where something has asked before."""
        with self._lock:
            if self.signal is not None:
                return False
            self.signal = number
            return True

    def start(self, workdir: Path, step: int, several: bool) -> None:
        """Learn from the run where it is: its next step is `step`, and there may be several hosts."""
        with self._lock:
            self._workdir, self.step, self._several = workdir, step, several

    @property
    def imminent(self) -> bool:
        """Return whether the run stops after the step under way for sure: several hosts must agree on it first."""
        return self.signal is not None and not self._several

    def after(self, step: int) -> bool:
        """Return whether to stop after this step. On several hosts all ask it of each step, and get one answer."""
        if self._several:
            from jax.experimental import multihost_utils  # noqa: PLC0415

            if self.signal is not None and not self._passed_on:
                self._passed_on = True
                os.kill(os.getpid(), signal.SIGTERM)
            if multihost_utils.reached_preemption_sync_point(step):
                self.request()
                return True
        with self._lock:
            if self.signal is not None and not self._several:
                return True
            self.step = step + 1
            return False

    def newest(self) -> int:
        """Return the step of the newest checkpoint that is written whole; 0 where there is none."""
        folders = [] if self._workdir is None else checkpoint_folders(self._workdir)
        return int(folders[-1].name) if folders else 0

    def outlook(self) -> str:
        """Say what happens now that the run is to stop."""
        step = "the first step" if self.step is None else f"step {self.step}"
        where = f"with the other hosts, after step {self.step} or soon after" if self._several else f"after {step}"
        return f"stopping {where}, then saving; again: end at once, and lose what is since step {self.newest()}"
