"""Files whole or not at all, folders that one process holds, JSON and paths of any origin."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from mae_jax import files
from mae_jax.files import (
    LEASE,
    check_picture,
    hold,
    local_path,
    read_json,
    save_picture,
    sync_tree,
    whole,
    write_atomically,
)
from tests.disk import REPLACED, recorded
from tests.refusals import refused


def failing(number):
    """A call that fails as the system's calls do."""

    def fail(*args, **keywords):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("call", ["os.replace", "os.fsync"])
def test_what_was_there_stays_where_there_is_no_room(tmp_path, monkeypatch, call):
    file = tmp_path / "words.txt"
    write_atomically(file, "before")
    monkeypatch.setattr(call, failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "after")
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_and_its_name_are_on_the_disk(tmp_path, monkeypatch):
    """What is written is synced before it takes its place, and the folder after."""
    order = recorded(monkeypatch)
    write_atomically(tmp_path / "words.txt", "after")
    assert order == [str(tmp_path / f".{os.getpid()}.words.txt"), REPLACED, str(tmp_path)]
    order.clear()
    with whole(tmp_path / "words.txt", tmp_path / "half") as beside:
        beside.write_text("by a name of the caller's")
    assert order == [str(tmp_path / "half"), REPLACED, str(tmp_path)]
    (tmp_path / "inner").mkdir()
    order.clear()
    sync_tree(tmp_path)
    assert order == [str(tmp_path / "inner"), str(tmp_path / "words.txt"), str(tmp_path)]


def test_a_read_only_disk_is_reported_in_a_sentence(tmp_path, monkeypatch):
    """There, to remove what is not there fails too."""
    monkeypatch.setattr(Image.Image, "save", failing(errno.EROFS))
    monkeypatch.setattr(Path, "unlink", failing(errno.EROFS))
    with refused("out", str(tmp_path / "a.png"), "cannot be written: Read-only file system"):
        save_picture(Image.new("RGB", (4, 4)), tmp_path / "a.png")


def test_an_ending_that_names_no_kind_of_picture_is_reported(tmp_path):
    with refused("sheet", "a.nothing cannot be written: unknown file extension"):
        save_picture(Image.new("RGB", (4, 4)), tmp_path / "a.nothing", "sheet")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_could_not_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "folder.png").mkdir()
    check_picture(tmp_path / "a.JPG")
    for path, words in (
        (tmp_path / "a", "no ending of a picture"),
        (tmp_path / "a.xyz", "no ending of a picture"),
        (tmp_path / "folder.png", "is a folder: choose another name"),
        (tmp_path / "none" / "a.png", "none is no folder that can be written to"),
        (Path("s3://bucket/a.png"), "is an address"),
    ):
        with refused("sheet", str(path), words):
            check_picture(path, "sheet")


@pytest.mark.parametrize("address", ["s3://bucket/run", "gs://bucket/run", "hdfs://host/run", "file:///run"])
def test_an_address_is_no_path_to_write_to(address, monkeypatch, tmp_path):
    """Neither as it is given nor as a Path has it, which keeps one slash."""
    for given in (address, Path(address)):
        with refused("workdir", f"workdir {given} is an address", "give a local path"):
            local_path(given, "workdir")
    monkeypatch.chdir(tmp_path)
    assert local_path("runs/a:b/c", "workdir") == tmp_path / "runs" / "a:b" / "c"
    assert local_path("/runs/s3:/b", "workdir") == Path("/runs/s3:/b")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
        (b"[" + b"9" * 5000 + b"]", "is not JSON: Exceeds the limit"),
        (b"[1, 2", "is not JSON: "),
        (b"", "is not JSON: "),
        (b"\xff\xfe\xfd", "is not JSON: "),
        (b"[" + b"1, " * 400_000 + b"1]", "has more than 1,000,000 bytes"),
    ],
    ids=["lists", "objects", "digits", "cut short", "empty", "not text", "large"],
)
def test_json_of_any_origin_is_read_within_bounds(tmp_path, content, words):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with refused("a.json", str(file), words):
        read_json(file, "a.json", limit=1_000_000)
    file.write_text('{"a": [1, null, "b"]}')
    assert read_json(file) == {"a": [1, None, "b"]}
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")


def test_an_endless_file_is_read_within_bounds():
    with refused(None, "/dev/zero"):
        read_json(Path("/dev/zero"), limit=1000)


HOLDING = "import sys, time; from pathlib import Path; from mae_jax.files import hold\n"


def test_a_folder_is_held_by_one_process_until_it_ends(tmp_path):
    program = f"{HOLDING}with hold(Path(sys.argv[1]), 'workdir'): print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with refused("workdir", f"{tmp_path} is in use by process {other.pid} on ", "(since 20"), hold(tmp_path, "workdir"):
        pass
    other.kill()
    other.communicate()
    with hold(tmp_path, "workdir") as held:
        held.check()
        with refused("workdir"), hold(tmp_path, "workdir"):
            pass
    with hold(tmp_path, "workdir"):
        pass


def test_a_child_that_is_given_the_lock_holds_on(tmp_path):
    with hold(tmp_path, "out") as held:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(held.lock,))
    with refused("out"), hold(tmp_path, "out"):
        pass
    child.communicate(b"\n")
    with hold(tmp_path, "out"):
        pass


def test_a_full_disk_hinders_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr("os.write", failing(errno.ENOSPC))
    with hold(tmp_path, "workdir"), refused("workdir", "in use by another process"), hold(tmp_path, "workdir"):
        pass


def test_a_failure_of_another_kind_is_no_lease(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"), hold(tmp_path, "workdir"):
        pass


@pytest.fixture(params=[errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def no_flock(request, monkeypatch):
    """A file system without flock, and times of tenths of a second."""
    monkeypatch.setattr("fcntl.flock", failing(request.param))
    monkeypatch.setattr(files, "RENEWED", 0.1)
    monkeypatch.setattr(files, "ENDS", 0.6)
    monkeypatch.setattr(files, "_LOOK", 0.02)


def test_a_lease_that_is_renewed_holds(tmp_path, no_flock):
    reported = []
    with hold(tmp_path, "workdir") as held:
        began = time.monotonic()
        with refused("workdir", f"in use by process {os.getpid()} on "), hold(tmp_path, "workdir", reported.append):
            pass
        assert time.monotonic() - began < 0.6
        held.check()
    assert not (tmp_path / LEASE).exists()
    assert len(reported) == 1
    with hold(tmp_path, "workdir", reported.append):
        pass
    assert len(reported) == 1


def test_a_lease_that_is_not_renewed_is_waited_for_and_taken(tmp_path, no_flock):
    reported = []
    (tmp_path / LEASE).write_text("process 7 on gone (since 2026)")
    began = time.monotonic()
    with hold(tmp_path, "workdir", reported.append) as held:
        assert 0.6 < time.monotonic() - began < 5
        held.check()
    assert len(reported) == 1
    assert "was held by process 7 on gone (since 2026); waiting up to" in reported[0]
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def test_whoever_was_stopped_for_too_long_learns_that_it_holds_no_more(tmp_path, no_flock, monkeypatch):
    monkeypatch.setattr(files, "_renew", lambda *arguments: None)
    with hold(tmp_path, "workdir") as held:
        (tmp_path / LEASE).write_text("process 8 on other (since 2026)")
        with refused("workdir", "no longer held by this process", "process 8 on other"):
            held.check()
    assert (tmp_path / LEASE).read_text() == "process 8 on other (since 2026)"


def test_of_many_that_wait_for_a_lease_one_gets_it(tmp_path, no_flock, monkeypatch):
    monkeypatch.setattr(files, "ENDS", 2.0)  # threads of a loaded machine renew theirs in time
    (tmp_path / LEASE).write_text("gone")
    taken, refusals = [], []
    done = threading.Event()

    def wait():
        try:
            with hold(tmp_path, "workdir", lambda text: None):
                taken.append(1)
                done.wait(30)
        except files.StatedError:
            refusals.append(1)
            if len(refusals) == 3:
                done.set()

    threads = [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refusals)) == (1, 3)
