"""Rows of metrics.jsonl that are read back: which are refused, and which are missing."""

import pytest

from mae_jax.runs.metrics import missing_steps, read_metrics
from mae_jax.storage.workdir import METRICS_FILE
from tests.refusals import refused


def test_there_are_no_rows_before_the_first(tmp_path):
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"garbage", "is not JSON: "),
        (b"5", "is not a step and its numbers (5)"),
        (b'{"loss": 1}', "is not a step and its numbers ({"),
        (b'{"step": "2"}', "is not a step and its numbers ({"),
        (b'{"step": NaN}', "is not a step and its numbers ({"),
        (b'{"step": 2, "loss": "low"}', "is not a step and its numbers ({"),
        (b"\xff\xfe", "is not JSON: "),
        (b'{"step": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, words):
    (tmp_path / METRICS_FILE).write_bytes(b'{"step": 1}\n' + line + b"\n")
    with refused(METRICS_FILE, f"{METRICS_FILE}, line 2", words, ": mend or remove it"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("steps", "start", "every", "missing"),
    [
        (range(1, 9), 8, 1, []),
        ((10, 20, 27, 30), 35, 10, []),
        ((10, 30, 40), 40, 10, [20]),
        ((), 40, 10, [10, 20, 30, 40]),
        ((10, 20), 40, 10, [30, 40]),
        ((20, 30, 40), 40, 10, [10]),
        ((50, 100, 110, 120), 120, 10, []),  # every 50 steps before
        ((10, 20, 30, 80, 130), 130, 10, []),  # and again since
        ((10, 20, 30, 80, 130, 140, 150), 150, 10, []),
        ((), 5, 10, []),
    ],
)
def test_which_rows_are_missing(steps, start, every, missing):
    assert missing_steps([{"step": step, "loss": 1.0} for step in steps], start, every) == missing
