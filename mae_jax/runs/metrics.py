"""The rows of metrics.jsonl, read back: one for each logged step, and one for each evaluation."""

from pathlib import Path
from typing import Any

from mae_jax.errors import StatedError
from mae_jax.files import parse_json
from mae_jax.storage.workdir import METRICS_FILE


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """Read the rows of metrics.jsonl, without a last line that a kill cut short.

    Raises:
      StatedError: another line is no row, or the file cannot be read.
    """
    file, rows = workdir / METRICS_FILE, []
    try:
        lines = file.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StatedError(f"{file} cannot be read ({error.strerror}): mend or remove it", field=METRICS_FILE) from error
    for number, line in enumerate(lines, 1):
        if line.endswith(b"\n"):
            try:
                row = parse_json(line, f"{file}, line {number},")
            except StatedError as error:
                raise StatedError(f"{error}: mend or remove it", field=METRICS_FILE) from error
            if not _is_row(row):
                raise StatedError(
                    f"{file}, line {number}, is not a step and its numbers ({line.decode().strip()[:80]}): "
                    "mend or remove it",
                    field=METRICS_FILE,
                )
            rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    is_step = isinstance(row, dict) and isinstance(row.get("step"), int)
    return is_step and all(isinstance(value, int | float) for value in row.values())


def once_each(rows: list[dict[str, float]]) -> tuple[list[dict[str, float]], list[int]]:
    """Keep the last row of each step, and of its evaluation, in order; and list the steps that had several."""
    kept: dict[tuple[float, bool], dict[str, float]] = {}
    doubled = set()
    for row in rows:
        if (key := (row["step"], "loss" not in row)) in kept:
            doubled.add(int(row["step"]))
        kept[key] = row
    return [kept[key] for key in sorted(kept)], sorted(doubled)


def missing_steps(rows: list[dict[str, float]], start: int, every: int) -> list[int]:
    """List the multiples of `every` up to `start` that have no row of the loss.

    Only between rows that stand so far apart, since `log_every` may have been another before: two of them, or the
    beginning, on the one side, and two, or `start`, on the other.
    """
    logged = {0} | {row["step"] for row in rows if "loss" in row}
    missing, gap = [], []
    for step in range(every, start + every + 1, every):
        if step <= start and step not in logged:
            gap.append(step)
            continue
        before = gap[0] - every if gap else 0
        if {max(0, before - every), before} <= logged and (
            step > start or step + every > start or step + every in logged
        ):
            missing += gap
        gap = []
    return missing
