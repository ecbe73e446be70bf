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


def children(pid: int) -> list[int]:
    """The processes that a process has started, from whichever of its threads, and that it has not waited for."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(child) for found in lists for child in found.read_text().split())
