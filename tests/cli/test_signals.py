"""What signals do to the process of a command."""

import os
import signal
import time

import pytest

from mae_jax.cli import signals
from mae_jax.cli.signals import SIGNALS, end_by_exception, stop_on_signals


@pytest.fixture
def own_handlers():
    """Handlers that take note, in place of those that would end the process."""
    seen = []
    before = {number: signal.signal(number, lambda number, frame: seen.append(number)) for number in SIGNALS}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def ends(monkeypatch):
    """The exit codes with which the process would have ended."""
    codes = []
    monkeypatch.setattr(signals.os, "_exit", codes.append)
    return codes


def wait_for(condition):
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_asks_and_the_second_ends(own_handlers, ends, capsys, number):
    with stop_on_signals(several_hosts=False) as request:
        os.kill(os.getpid(), number)
        wait_for(lambda: request.signal == number)
        time.sleep(0.01)
        assert ends == []
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: ends)
    assert ends == [130]
    assert own_handlers == []
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"mae-jax: {number.name}: stopping after the first step, then saving; again: end at once")
    assert second.startswith("mae-jax: SIGINT: ended at once; what is since step 0 is lost")


def test_what_is_ignored_stays_ignored(own_handlers, ends):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_on_signals(several_hosts=False) as request:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: request.signal)
        assert request.signal == signal.SIGUSR1
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_among_hosts_sigterm_stays_with_jax(own_handlers, ends):
    with stop_on_signals(several_hosts=True) as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert own_handlers == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: request.signal)
        assert request.signal == signal.SIGINT


def test_handlers_are_put_back(own_handlers):
    before = [signal.getsignal(number) for number in SIGNALS]
    with stop_on_signals(several_hosts=False):
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", [number for number in SIGNALS if number != signal.SIGINT])
def test_other_commands_end_by_an_exception(own_handlers, number):
    signal.signal(number, signal.SIG_DFL)
    end_by_exception()
    with pytest.raises(SystemExit) as ended:
        signal.raise_signal(number)
    assert ended.value.code == 128 + number


def test_a_handler_that_is_there_is_left(own_handlers):
    end_by_exception()
    os.kill(os.getpid(), signal.SIGTERM)
    assert own_handlers == [signal.SIGTERM]
