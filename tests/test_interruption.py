"""A signal becomes an exception wherever it arrives."""

import gc
import signal
import time
from collections.abc import Iterator

import pytest

from mae_jax.interruption import end_by_exception

ENDS = [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number, _ in ENDS}
    end_by_exception(*before)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "raised"), ENDS)
def test_at_once(number, raised):
    with pytest.raises(raised) as ended:
        signal.raise_signal(number)
    assert getattr(ended.value, "code", 143) == 143


@pytest.mark.parametrize(("number", "raised"), ENDS)
def test_a_little_later_where_the_garbage_collector_would_drop_it(number, raised):
    reached = []

    def callback(phase, about):
        if phase == "start" and not reached:
            reached.append(phase)
            signal.raise_signal(number)

    gc.callbacks.append(callback)

    def collect():
        gc.collect()  # an exception raised in there would be printed, which is an error here
        reached.append("collected")
        time.sleep(10)

    try:
        with pytest.raises(raised):
            collect()
    finally:
        gc.callbacks.remove(callback)
    assert reached == ["start", "collected"]


@pytest.mark.parametrize(("number", "raised"), ENDS)
def test_a_little_later_where_a_finalizer_would_drop_it(number, raised):
    class Signals:
        def __del__(self):
            signal.raise_signal(number)

    def drop():
        Signals()
        time.sleep(10)

    with pytest.raises(raised):
        drop()
