"""Processes that tests start, and see end."""

import socket
import time
from pathlib import Path


def free_port() -> int:
    """Return a port that nobody listens on, as yet."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def dies(pid: int) -> bool:
    """Whether a process that has been sent a signal is gone within a few seconds, or dead and not yet reaped."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False
