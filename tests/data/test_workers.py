"""A function of many things, in order, in threads and in worker processes."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_jax.data.loader import OrderedMap
from mae_jax.data.workers import DeadWorkerError
from tests.processes import children
from tests.refusals import refused

ROOT = Path(__file__).parents[2]
Started = Callable[[], list[int]]


@pytest.fixture
def started() -> Started:
    """Lists the processes that this one has started since the test began; other tests' may still be there."""
    others = set(children(os.getpid()))
    return lambda: [pid for pid in children(os.getpid()) if pid not in others]


def slow_first(thing: int) -> tuple[int, bytes, np.ndarray]:
    """The first of them comes last, and answers are larger than a pipe."""
    time.sleep(0.5 if thing == 0 else 0)
    return thing, bytes(100_000), np.full((300, 200), thing)


@pytest.mark.parametrize(("workers", "threads"), [(0, 0), (0, 1), (0, 3), (1, 0), (3, 2)])
def test_results_come_in_order(started: Started, workers: int, threads: int) -> None:
    with OrderedMap(slow_first, range(40), workers=workers, threads=threads) as results:
        found = list(results)
    assert [(thing, len(data)) for thing, data, _ in found] == [(thing, 100_000) for thing in range(40)]
    assert all((array == thing).all() for thing, _, array in found)
    assert not started()


@pytest.mark.parametrize(("workers", "threads"), [(0, 0), (0, 2), (2, 0)])
def test_of_nothing_comes_nothing(workers: int, threads: int) -> None:
    assert list(OrderedMap(slow_first, [], workers=workers, threads=threads)) == []


def test_no_more_processes_than_things_and_no_more_things_ahead_than_needed(started: Started) -> None:
    taken: list[int] = []

    def things(count: int) -> Iterator[int]:
        for number in range(count):
            taken.append(number)
            yield number

    with OrderedMap(slow_first, things(1), workers=4, threads=0) as results:
        next(results)
        assert len(started()) == 1
    with OrderedMap(slow_first, things(100), workers=2, threads=0) as results:
        next(results)
        assert len(started()) == 2
    assert len(taken) == 1 + 6
    assert not started()


def fails(thing: int) -> int:
    if thing == 2:
        raise ValueError(f"no {thing}")
    return thing


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_comes_at_its_turn_with_its_place(started: Started, workers: int) -> None:
    results = OrderedMap(fails, range(9), workers=workers, threads=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="no 2") as error:
        next(results)
    if workers:
        assert "in fails" in error.value.__notes__[0]
    assert list(results) == []
    assert not started()


class OddError(Exception):
    """One that pickle cannot make again."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def fails_oddly(thing: int) -> Any:
    if thing:
        raise OddError(1, 2)
    return lambda: thing


def test_what_cannot_be_pickled_is_named() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError), match=r"Can't (pickle|get) local object"):
        list(OrderedMap(fails_oddly, [0], workers=1, threads=0))
    with pytest.raises(RuntimeError, match="OddError: 1 and 2"):
        list(OrderedMap(fails_oddly, [1], workers=1, threads=0))


class NotThere:
    """One that cannot be unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return missing, ()

    def __call__(self, thing: int) -> int:
        return thing


def missing() -> None:
    raise LookupError("no such source here")


def test_a_function_that_a_worker_cannot_make_says_why() -> None:
    with pytest.raises(LookupError, match="no such source here"):
        list(OrderedMap(NotThere(), range(3), workers=1, threads=0))


def handling(thing: int) -> tuple[int, list[Any]]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    return os.getsid(0), [signal.getsignal(number) for number in numbers]


def test_signals_are_the_owners() -> None:
    for session, handlers in OrderedMap(handling, range(4), workers=2, threads=0):
        assert session != os.getsid(0)
        assert set(handlers) == {signal.SIG_IGN}


def test_the_callers_process_stays_as_it_is() -> None:
    def settings() -> tuple[Any, ...]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        return signal.pthread_sigmask(signal.SIG_BLOCK, ()), [signal.getsignal(n) for n in numbers], dict(os.environ)

    before = settings()
    for workers in (0, 2):
        list(OrderedMap(fails, [0, 1], workers=workers, threads=2))
    assert settings() == before


def process_of(thing: int) -> int:
    time.sleep(0.3 if thing % 8 == 0 else 0.001)
    return os.getpid()


def test_slow_things_do_not_all_wait_for_one_process() -> None:
    """As they would if things were given out by turns."""
    found = list(OrderedMap(process_of, range(32), workers=4, threads=0))
    assert len(set(found[::8])) > 1


def killed_in_the_middle_of_its_answer(thing: int) -> np.ndarray:
    """As by a system that is out of memory."""

    def half(pipe: Connection, message: bytes) -> None:
        os.write(pipe.fileno(), bytes(message[: len(message) // 2]))
        os.kill(os.getpid(), signal.SIGKILL)

    if thing == 3:
        Connection._send = half  # type: ignore[attr-defined]
    return np.zeros(10**6, np.uint8)


def test_a_worker_killed_within_its_answer_is_named(started: Started) -> None:
    began = time.monotonic()
    with refused("workers", "a worker process was killed by SIGKILL", "use fewer --workers", kind=DeadWorkerError):
        list(OrderedMap(killed_in_the_middle_of_its_answer, range(9), workers=2, threads=0))
    assert time.monotonic() - began < 5
    assert not started()


def large(thing: int) -> np.ndarray:
    return np.full(4 * 10**6, thing, np.uint8)


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.3, 0.6, 0.9])
def test_a_worker_killed_at_any_moment_ends_the_work(started: Started, delay: float) -> None:
    """While it starts too."""
    with OrderedMap(large, range(10**6), workers=2, threads=0) as results:

        def kill() -> None:
            while not (found := started()):
                time.sleep(0.001)
            time.sleep(delay)
            os.kill(found[-1], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        with refused("workers", kind=DeadWorkerError):
            for _ in results:
                pass
        killer.join()
    assert not started()


def leaves(thing: int) -> None:
    os._exit(7)


def test_a_worker_that_ends_by_itself_is_named() -> None:
    with refused("workers", "ended by itself with exit code 7", kind=DeadWorkerError):
        list(OrderedMap(leaves, range(3), workers=1, threads=0))


WITHOUT_GUARD = """
import os, sys
from mae_jax.data.loader import OrderedMap
from tests.processes import children
print("imported")

class Mine:
    def __call__(self, thing):
        return thing * 2

results = OrderedMap(Mine(), range(9), workers=2, threads=0)
print(next(results), len(children(os.getpid())), *results)
assert {name for name in os.listdir("/dev/shm")} <= set(sys.argv[1:])
"""


def script(text: str, tmp_path: Path, before: str = "") -> str:
    """Run a script and return what it prints; it must be silent otherwise."""
    path = tmp_path / "script.py"
    path.write_text(text)
    done = subprocess.run(
        ["bash", "-c", f'{before} exec "$@"', "bash", sys.executable, "-W", "error", path, *os.listdir("/dev/shm")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_script_needs_no_guard_and_no_module_of_its_own(tmp_path: Path) -> None:
    """Within 64 open files and 6 GB of address space; shared memory is not used at all."""
    found = script(WITHOUT_GUARD, tmp_path, before="ulimit -n 64; ulimit -v 6000000;")
    assert found == "imported\n0 2 2 4 6 8 10 12 14 16\n"
