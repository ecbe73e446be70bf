"""SIGTERM and Ctrl-C are remembered once, and handlers are put back."""

import os
import signal

import pytest

from mae_jax.train.signals import SIGNALS, StopRequest


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
