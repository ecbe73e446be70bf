"""metrics.jsonl across restarts, and what is reported on the way."""

import contextlib
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from mae_jax.runs.log import EVENTS, RunLog, SilentLog
from mae_jax.runs.metrics import read_metrics
from mae_jax.storage.workdir import METRICS_FILE
from tests.refusals import refused


def write_run(workdir, start, stop, *, loss=1.0):
    with RunLog(workdir, start, stop) as log:
        for step in range(start + 1, stop + 1):
            log.step_done()
            log.row(step, {"loss": loss / step, "grad_norm": 2.0})


def test_rows_come_back_as_they_were(tmp_path):
    write_run(tmp_path, 0, 3)
    assert read_metrics(tmp_path) == [{"step": s, "loss": 1 / s, "grad_norm": 2.0} for s in (1, 2, 3)]


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


def test_a_folder_in_the_place_of_the_rows_is_named(tmp_path):
    (tmp_path / METRICS_FILE).mkdir()
    with refused(METRICS_FILE, "metrics.jsonl cannot be read (Is a directory): mend or remove it"):
        RunLog(tmp_path, 0, 3)


def continued(workdir, text, start, every, capsys):
    """What is reported, and the rows that are left, where a run goes on after `start`."""
    (workdir / METRICS_FILE).write_text(text)
    with RunLog(workdir, start, start + 1, every):
        pass
    return capsys.readouterr().out, read_metrics(workdir)


def lines(*steps, key="loss"):
    return "".join(json.dumps({"step": step, key: 1.0}) + "\n" for step in steps)


def test_rows_that_stand_twice_are_kept_once(tmp_path, capsys):
    """A step and its evaluation are two rows. The last of several is the one that the checkpoint follows from."""
    text = lines(1, 2) + lines(2, key="top1") + lines(3, 2, 4) + '{"step": 2, "loss": 7.0}\n' + lines(3)
    out, rows = continued(tmp_path, text, 4, 1, capsys)
    assert out == f"WARNING: {tmp_path / METRICS_FILE} had more than one row of steps 2, 3: the last of each is kept\n"
    assert [(row["step"], row.get("loss", "evaluated")) for row in rows] == [
        (1, 1.0),
        (2, 7.0),
        (2, "evaluated"),
        (3, 1.0),
        (4, 1.0),
    ]


def test_rows_that_are_missing_are_named(tmp_path, capsys):
    out, _ = continued(tmp_path, lines(*(set(range(1, 20)) - {3, 6, 7, 8, 11, 12})), 20, 1, capsys)
    assert out == (
        f"WARNING: {tmp_path / METRICS_FILE} has no row of steps 3, 6, 7, 8, 11 and 2 more, which came before step 20\n"
    )


def test_rows_are_on_the_disk_before_a_checkpoint(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    with RunLog(tmp_path, 0, 3) as log:
        synced.clear()
        log.row(1, {"loss": 1.0})
        log.sync()
        assert synced == [str(tmp_path / METRICS_FILE)]
        monkeypatch.setattr("os.fsync", full)
        with refused(METRICS_FILE, "cannot be written: No space left on device. Make room"):
            log.sync()


def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("stream", ["/dev/full", "closed", "None"])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_nobody_to_report_to_is_no_reason_to_end(tmp_path, monkeypatch, name, stream):
    """A full disk behind the output, a terminal that is gone, no output at all."""
    with open(tmp_path / "out" if stream == "closed" else "/dev/full", "w", buffering=1) as output:
        if stream == "closed":
            output.close()
        monkeypatch.setattr(f"sys.{name}", None if stream == "None" else output)
        with RunLog(tmp_path, 0, 3) as log:
            log.step_done()
            log.row(1, {"loss": 1.0})
            log.message("a file is broken")
        SilentLog(1).message("a file is broken")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            output.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_a_full_disk_is_reported_in_a_sentence(tmp_path):
    """/dev/full takes nothing."""
    with RunLog(tmp_path, 0, 3) as log:
        log._file.close()
        log._file = Path("/dev/full").open("a", buffering=1)  # noqa: SIM115
        with refused(EVENTS, "/dev/full cannot be written: No space left on device. Make room"):
            log.row(1, {"loss": 1.0})


def test_so_is_one_under_the_event_file(tmp_path):
    with RunLog(tmp_path, 0, 3) as log:
        log._events.close()
        log._events.path = "/dev/full"
        log._events._writer = RecordWriter(Path("/dev/full").open("wb"))  # noqa: SIM115
        with refused(EVENTS, "/dev/full cannot be written: No space left on device. Make room"):
            log.row(1, {"loss": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_a_file_in_the_place_of_the_events_is_named(tmp_path):
    (tmp_path / EVENTS).touch()
    with refused(EVENTS, f"no event file can be made in {tmp_path / EVENTS}: File exists"):
        RunLog(tmp_path, 0, 3)


@pytest.mark.parametrize("taken", ["os.replace", "mae_jax.runs.log.Events._write"])
def test_a_log_that_cannot_begin_leaves_no_file_open(tmp_path, monkeypatch, taken):
    opened = sorted(Path("/proc/self/fd").iterdir())
    monkeypatch.setattr(taken, full)
    with refused(METRICS_FILE if taken == "os.replace" else EVENTS, "No space left"):
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
