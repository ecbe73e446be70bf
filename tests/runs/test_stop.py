"""SIGTERM and Ctrl-C are remembered once, and handlers are put back."""

import os
import signal

import pytest
from jax.experimental import multihost_utils

from mae_jax.runs.stop import SIGNALS, StopRequest


@pytest.fixture
def own_handlers():
    """Handlers that take note, in place of those that would end the process."""
    seen = []
    before = {number: signal.signal(number, lambda number, frame: seen.append(number)) for number in SIGNALS}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_remembered_and_the_second_is_not_ours(own_handlers, number):
    with StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.signal == number
        assert own_handlers == []
        os.kill(os.getpid(), number)
        assert own_handlers == [number]


def test_a_ctrl_c_after_a_sigterm_is_the_second(own_handlers):
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGTERM
        assert own_handlers == [signal.SIGINT]


def test_handlers_are_put_back(own_handlers):
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(RuntimeError, match="inside"), StopRequest():
        raise RuntimeError("inside")
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_alone_a_signal_stops_after_the_next_step(own_handlers):
    with StopRequest() as stop:
        assert not stop.after(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.after(2)


def test_among_hosts_all_stop_where_the_service_says(own_handlers, monkeypatch):
    """SIGTERM is the service's own to catch, and Ctrl-C is handed to it as one."""
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: step == 9)
    with StopRequest(hosts=2) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert own_handlers == [signal.SIGTERM]
        assert not stop.after(8)
        assert stop.after(9)
        assert stop.signal == signal.SIGINT
    with StopRequest(hosts=2) as stop:
        assert stop.after(9)
        assert stop.signal == signal.SIGTERM
