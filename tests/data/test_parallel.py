"""A function over many things in several processes."""

import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import closing
from multiprocessing import active_children
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from mae_jax.data.parallel import ordered_map
from mae_jax.errors import StatedError

ROOT = Path(__file__).parents[2]


def slow_first(thing: int) -> tuple[int, bytes]:
    """The first of them comes last, and answers are larger than a pipe."""
    time.sleep(0.5 if thing == 0 else 0)
    return thing, bytes(100_000)


@pytest.mark.parametrize("processes", [0, 1, 3])
def test_results_come_in_order(processes: int) -> None:
    assert [thing for thing, _ in ordered_map(slow_first, range(40), processes)] == list(range(40))
    assert not active_children()


def test_of_nothing_comes_nothing() -> None:
    assert list(ordered_map(slow_first, [], 2)) == []


def test_no_more_processes_than_things_and_no_more_things_ahead_than_needed() -> None:
    taken: list[int] = []

    def things(count: int) -> Any:
        for number in range(count):
            taken.append(number)
            yield number

    with closing(ordered_map(slow_first, things(1), 4)) as results:
        next(results)
        assert len(active_children()) == 1
    with closing(ordered_map(slow_first, things(100), 2)) as results:
        next(results)
        assert len(active_children()) == 2
    assert len(taken) == 1 + 6
    assert not active_children()


def fails(thing: int) -> int:
    if thing == 2:
        raise ValueError(f"no {thing}")
    return thing


def test_an_exception_comes_at_its_turn_and_tells_where_it_was_raised() -> None:
    results = ordered_map(fails, range(9), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="no 2") as error:
        next(results)
    assert "in fails" in error.value.__notes__[0]
    assert not active_children()


class OddError(Exception):
    """One that pickle cannot make again."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def fails_oddly(thing: int) -> Any:
    if thing:
        raise OddError(1, 2)
    return lambda: thing


def test_what_cannot_be_pickled_is_told() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError), match="Can't pickle local object"):
        list(ordered_map(fails_oddly, [0], 1))
    with pytest.raises(RuntimeError, match="OddError: 1 and 2"):
        list(ordered_map(fails_oddly, [1], 1))
    assert not active_children()


def blocked_signals(thing: int) -> set[signal.Signals | int]:
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, set()))


def test_no_process_sees_what_is_the_owners() -> None:
    """In a new process, since Python's resource tracker starts once."""
    program = (
        "from tests.data.test_parallel import *\n"
        "if __name__ == '__main__': print(list(ordered_map(blocked_signals, range(9), 3)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.count("SIGINT") == done.stdout.count("SIGTERM") == 9


def process_of(thing: int) -> int:
    time.sleep(0.3 if thing % 8 == 0 else 0.001)
    return os.getpid()


def test_slow_things_do_not_all_wait_for_one_process() -> None:
    """As they would if things were given out by turns."""
    found = list(ordered_map(process_of, range(32), 4))
    assert len(set(found[::8])) > 1


def killed_in_the_middle_of_its_answer(thing: int) -> int:
    """As by a system that is out of memory."""

    def half(pipe: Connection, message: bytes) -> None:
        os.write(pipe.fileno(), bytes(message[: len(message) // 2]))
        os.kill(os.getpid(), signal.SIGKILL)

    if thing == 3:
        Connection._send = half  # type: ignore[attr-defined]
    return thing


def test_a_killed_process_is_told() -> None:
    with pytest.raises(StatedError, match="ended by itself or was killed"):
        list(ordered_map(killed_in_the_middle_of_its_answer, range(9), 2))
    assert not active_children()
