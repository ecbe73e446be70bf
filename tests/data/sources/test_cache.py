"""Remote shards on this disk: fetched once, checked, and no more of them than there may be."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from mae_jax.data.sources.cache import LIMIT, Held, check_room, fetch
from mae_jax.data.sources.records import RecordSource
from mae_jax.data.sources.source import open_source
from tests.data.records import Make, prepared
from tests.disk import REPLACED, recorded
from tests.refusals import refused

ROOT = Path(__file__).parents[3]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(LIMIT, raising=False)
    return tmp_path / "cache/mae_jax/records"


def kept(cache: Path) -> list[str]:
    """What is there but for locks."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def contents(number: int) -> bytes:
    return bytes([number]) * 1000


def writes(content: bytes) -> Callable[[str], None]:
    def get(path: str) -> None:
        Path(path).write_bytes(content)

    return get


def fetched(number: int) -> Held:
    return fetch(sha256(contents(number)), 1000, writes(contents(number)), f"file {number}")


def test_any_address_of_fsspec(make_folder: Make, tmp_path: Path, cache: Path) -> None:
    folder = make_folder("photos", 12)
    local, remote = prepared(folder, tmp_path / "local"), prepared(folder, "memory://bucket/records")
    assert [remote.file(i) for i in range(12)] == [local.file(i) for i in range(12)]
    assert len(kept(cache)) == 3
    assert "bucket/records" in remote.name(0)
    same = open_source(f"records:file://{tmp_path}/local", 3)
    assert same.label(11) == local.label(11) == 1
    assert not fsspec.filesystem("memory").glob("/bucket/records/*.json.partial")


def test_a_shard_that_came_damaged_is_not_kept(make_folder: Make, cache: Path) -> None:
    remote = prepared(make_folder("photos", 4), "memory://damaged")
    shard = remote.manifest.shards[0].file
    with fsspec.open(f"memory://damaged/{shard}", "wb") as file:
        file.write(b"something else")
    with refused("dataset.json", "has SHA-256", "was changed or came damaged"):
        remote.file(0)
    assert kept(cache) == []


def test_a_file_is_on_the_disk_when_it_has_its_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has its name is not summed up again, and a power cut must not have emptied it."""
    order = recorded(monkeypatch)
    fetched(1).close()
    assert order == [str(cache / f"{sha256(contents(1))}.partial"), REPLACED, str(cache)]


def test_a_file_is_fetched_once_for_all_threads(cache: Path) -> None:
    calls: list[str] = []

    def get(path: str) -> None:
        calls.append(path)
        time.sleep(0.2)
        Path(path).write_bytes(contents(1))

    def want() -> None:
        found.append(fetch(sha256(contents(1)), 1000, get, "it").path.read_bytes())

    found: list[bytes] = []
    threads = [threading.Thread(target=want) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [contents(1)] * 5
    assert len(calls) == 1


PROGRAM = """
import sys, time
from pathlib import Path
from mae_jax.data.sources.cache import fetch
sha, log, wait = sys.argv[1:]
def get(path):
    with open(log, "a") as file: print("fetched", file=file)
    Path(path).write_bytes(bytes(500))
    time.sleep(float(wait))
    Path(path).write_bytes(bytes(1000))
assert fetch(sha, 1000, get, "it").path.read_bytes() == bytes(1000)
"""


def test_a_file_is_fetched_once_for_all_processes_and_again_after_a_kill(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def start(wait: float) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", PROGRAM, sha256(bytes(1000)), log, str(wait)]
        return subprocess.Popen(command, cwd=ROOT)

    killed = start(60)
    while not log.exists() or not log.read_text():
        time.sleep(0.01)
    others = [start(0.3) for _ in range(3)]
    time.sleep(0.5)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert [process.wait(30) for process in others] == [0, 0, 0]
    assert log.read_text().count("fetched") == 2
    assert kept(cache) == [sha256(bytes(1000))]


def test_the_least_recently_used_go_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "0.000003")
    for number in (1, 2, 3):
        fetched(number).close()
        os.utime(cache / sha256(contents(number)), (number, number))
    fetched(1).close()  # is used again
    fetched(4).close()
    assert kept(cache) == sorted(sha256(contents(number)) for number in (1, 3, 4))


def test_what_is_in_use_stays(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "0.000002")
    first, second = fetched(1), fetched(2)
    with refused(LIMIT, "file 3 does not fit", "is in use", "set MAE_JAX_CACHE_GB to more"):
        fetched(3)
    assert kept(cache) == sorted(sha256(contents(number)) for number in (1, 2))
    first.close()
    fetched(3).close()
    assert kept(cache) == sorted(sha256(contents(number)) for number in (2, 3))
    second.close()


def test_what_a_killed_process_left_makes_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "0.000002")
    cache.mkdir(parents=True)
    (cache / f"{sha256(b'x')}.partial").write_bytes(bytes(1500))
    fetched(1).close()
    assert kept(cache) == [sha256(contents(1))]


def test_what_did_not_come_is_fetched_anew(cache: Path) -> None:
    def fail(path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("the line is dead")

    with pytest.raises(OSError, match="the line is dead"):
        fetch(sha256(contents(1)), 1000, fail, "it")
    assert kept(cache) == []
    fetched(1).close()


def test_more_than_may_be_kept_is_refused_at_the_start(
    make_folder: Make, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(make_folder("photos", 4), "memory://large")
    monkeypatch.setenv(LIMIT, "0.000001")
    with refused(LIMIT, "records:memory://large has", "at most 1e-06 GB are kept in"):
        RecordSource("memory://large")


@pytest.mark.parametrize("limit", ["much", "-1", "nan"])
def test_a_limit_that_is_none(cache: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setenv(LIMIT, limit)
    with refused(LIMIT, "is no number of gigabytes"):
        check_room(1, "it")


def test_by_default_half_of_the_disk(cache: Path) -> None:
    check_room(10**6, "it")
    with refused(LIMIT):
        check_room(10**17, "it")
