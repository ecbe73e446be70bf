"""metrics.jsonl across restarts, and what is said on the way."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from mae_jax.errors import StatedError
from mae_jax.runs.log import EVENTS, METRICS_FILE, RunLog, SilentLog, read_metrics


def write_run(workdir, start, stop, *, loss=1.0):
    with RunLog(workdir, start, stop) as log:
        for step in range(start + 1, stop + 1):
            log.step_done()
            log.row(step, {"loss": loss / step, "grad_norm": 2.0})


def test_rows_come_back_as_they_were(tmp_path):
    write_run(tmp_path, 0, 3)
    assert read_metrics(tmp_path) == [{"step": s, "loss": 1 / s, "grad_norm": 2.0} for s in (1, 2, 3)]


def test_there_are_no_rows_before_the_first(tmp_path):
    assert read_metrics(tmp_path) == []


def test_a_restart_drops_the_rows_that_it_will_write_again(tmp_path):
    write_run(tmp_path, 0, 5)
    write_run(tmp_path, 3, 6, loss=10.0)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows] == [1, 1 / 2, 1 / 3, 10 / 4, 10 / 5, 10 / 6]


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    write_run(tmp_path, 0, 2)
    file = tmp_path / METRICS_FILE
    file.write_text(file.read_text() + '{"step": 3, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    write_run(tmp_path, 2, 3)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]


def test_a_row_is_in_the_file_at_once(tmp_path):
    with RunLog(tmp_path, 0, 9) as log:
        log.row(1, {"loss": 0.5})
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    with RunLog(tmp_path, 0, 20) as log:
        log.message("starting")
        log.row(10, {"loss": 0.123456, "learning_rate": 1e-3, "grad_norm": 7.0})
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "starting"
    assert out[1].startswith("step 10/20  ")
    assert "loss 0.1235" in out[1]
    assert "lr 0.001" in out[1]
    assert "grad_norm" not in out[1]  # in the file, not on the screen
    assert "ETA 0:00:00" in out[1]


def test_the_event_file_holds_numbers_and_pictures(tmp_path):
    with RunLog(tmp_path, 0, 2) as log:
        log.row(2, {"loss": 0.25})
        log.picture("reconstruction", 2, np.full((4, 5, 3), 200, np.uint8))
    (file,) = (tmp_path / EVENTS).iterdir()
    data = file.read_bytes()
    assert b"loss" in data
    assert b"reconstruction" in data
    assert b"\x89PNG" in data


@pytest.mark.parametrize("name", ["loss", "reconstruction"])
def test_an_empty_log_has_neither(tmp_path, name):
    with RunLog(tmp_path, 0, 2):
        pass
    assert all(name.encode() not in file.read_bytes() for file in (tmp_path / EVENTS).iterdir())


def test_a_line_that_is_no_row_is_named(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\ngarbage\n')
    with pytest.raises(StatedError, match=r"metrics.jsonl, line 2, is not JSON .*: mend or remove it"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"5", r"is not a step and its numbers \(5\)"),
        (b'{"loss": 1}', r"is not a step and its numbers \(\{"),
        (b'{"step": 2, "loss": "low"}', r"is not a step and its numbers \(\{"),
        (b"\xff\xfe", r"is not JSON \(.*can't decode"),
    ],
)
def test_so_is_one_of_another_kind(tmp_path, line, said):
    (tmp_path / METRICS_FILE).write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(StatedError, match=rf"metrics.jsonl, line 2, {said}.*: mend or remove it$"):
        RunLog(tmp_path, 1, 3)


def test_a_folder_in_the_place_of_the_rows_is_named(tmp_path):
    (tmp_path / METRICS_FILE).mkdir()
    with pytest.raises(StatedError, match=r"metrics.jsonl cannot be read \(Is a directory\): mend or remove it$"):
        RunLog(tmp_path, 0, 3)


def test_a_full_disk_is_said_in_a_sentence(tmp_path):
    """/dev/full takes nothing."""
    with RunLog(tmp_path, 0, 3) as log:
        log._file.close()
        log._file = Path("/dev/full").open("a", buffering=1)  # noqa: SIM115
        with pytest.raises(StatedError, match=r"/dev/full cannot be written: No space left on device\. Make room"):
            log.row(1, {"loss": 1.0})


def test_so_is_one_under_the_event_file(tmp_path):
    with RunLog(tmp_path, 0, 3) as log:
        log._events.close()
        log._events.path = "/dev/full"
        log._events._writer = RecordWriter(Path("/dev/full").open("wb"))  # noqa: SIM115
        with pytest.raises(StatedError, match=r"/dev/full cannot be written: No space left on device\. Make room"):
            log.row(1, {"loss": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_a_file_in_the_place_of_the_events_is_named(tmp_path):
    (tmp_path / EVENTS).touch()
    with pytest.raises(StatedError, match=rf"no event file can be made in {tmp_path / EVENTS}: File exists"):
        RunLog(tmp_path, 0, 3)


@pytest.mark.parametrize("taken", ["os.replace", "mae_jax.runs.log.Events._write"])
def test_a_log_that_cannot_begin_leaves_no_file_open(tmp_path, monkeypatch, taken):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    opened = sorted(Path("/proc/self/fd").iterdir())
    monkeypatch.setattr(taken, full)
    with pytest.raises(StatedError, match=r"(metrics.jsonl cannot|no event file can) be .*: No space left"):
        RunLog(tmp_path, 0, 3)
    assert sorted(Path("/proc/self/fd").iterdir()) == opened


def test_other_hosts_write_nothing(tmp_path, capsys):
    with SilentLog(3) as log:
        log.step_done()
        log.row(1, {"loss": 1.0})
        log.picture("x", 1, np.zeros((4, 4, 3), np.uint8))
        log.message("a file is broken")
    assert capsys.readouterr().out == "host 3: a file is broken\n"
    assert list(tmp_path.iterdir()) == []
