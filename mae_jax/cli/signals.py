"""What signals do to a command: the first asks a run to stop, or ends any other command.

Besides SIGTERM and Ctrl-C these are SIGHUP, which comes when a connection by ssh is lost, and SIGUSR1 and SIGUSR2,
which clusters send before a limit. One that is ignored when the command starts, as under nohup, stays ignored.
A program that calls mae_jax from Python has none of these handlers.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from mae_jax.runs.stop import StopRequest

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def end_by_exception() -> None:
    """Let each signal raise SystemExit, as Ctrl-C raises KeyboardInterrupt, so that what is half done is undone."""
    for number in SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _exit)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


@contextlib.contextmanager
def stop_on_signals(several_hosts: bool) -> "Iterator[StopRequest]":
    """Give a request that the first signal makes, and answer it at once; a second one ends the process at once.

    A thread answers, woken by Python's own handler in C: the main thread may be in the compiler or wait for a step for
    minutes, where no handler in Python runs. On several hosts SIGTERM stays with JAX's preemption service.
    """
    from mae_jax.runs.stop import StopRequest

    request = StopRequest()
    taken = [
        number
        for number in SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN and not (several_hosts and number == signal.SIGTERM)
    ]
    terminals = [stream for stream in (0, 1, 2) if os.isatty(stream)]  # one that is gone does not look like one
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    answering = threading.Thread(target=_answer, args=(reader, taken, request, terminals), daemon=True)
    answering.start()
    woken_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda number, frame: None) for number in taken}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken_before)
        writer.close()
        answering.join()
        reader.close()


def _answer(reader: socket.socket, taken: list[signal.Signals], request: "StopRequest", terminals: list[int]) -> None:
    while received := reader.recv(1):
        number = signal.Signals(received[0])
        if number not in taken:
            continue
        first = request.request(number)
        if number == signal.SIGHUP:
            _detach(terminals)
        if first:
            _report(f"{number.name}: {request.outlook()}")
            continue
        _report(f"{number.name}: ended at once; what is since step {request.newest()} is lost. Run again, it continues")
        os._exit(128 + number)


def _report(text: str) -> None:
    line = f"\nmae-jax: {text}" if sys.stderr.isatty() else f"mae-jax: {text}"
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _detach(terminals: list[int]) -> None:
    """Write nothing more to a terminal that is gone: it would fail, and end the run before it has saved."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in terminals:
        os.dup2(null, number)
