"""A run's folder: config.json, checkpoints/, metrics.jsonl, tensorboard/, and what is drawn into it."""

import contextlib
import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import dacite

from mae_jax.config import FinetuneConfig, PretrainConfig, Run
from mae_jax.errors import StatedError
from mae_jax.files import write_atomically

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
RECORD = "record"  # what a checkpoint says of itself: {"config": ..., "fingerprint": ..., "examples": ...}


CONFIGS: dict[str, type[Run]] = {config.kind: config for config in (PretrainConfig, FinetuneConfig)}


class Record(NamedTuple):
    """What a checkpoint says of itself."""

    config: Run
    fingerprint: dict[str, int]  # of each array
    examples: int | None  # how many the run's data had; None where there was no run


def make_writable(folder: Path) -> None:
    """Make a folder where it is missing; OSError where it cannot be written to, though not where the disk is full."""
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)  # needs no room


def unwritable(workdir: str, error: OSError) -> StatedError:
    """What to tell the user whose work directory gave this error."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = "make room, and run the same command again" if full else "choose another"
    return StatedError(f"workdir {workdir} cannot be written to ({error.strerror}): {advice}")


def config_to_dict(config: Run) -> dict[str, Any]:
    """Take a configuration apart into what JSON can hold, the way it comes back: its kind, tuples as lists."""
    return {"kind": config.kind} | json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_dict(values: dict[str, Any], origin: object) -> Run:
    """The configuration that `config_to_dict` took apart; unknown fields and other types are refused.

    Raises:
      StatedError: the values do not make a configuration; `origin` names where they come from.
    """

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tuples(inner) for key, inner in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    # Version 0.1.0 wrote no kind.
    kind = values.get("kind", FinetuneConfig.kind if "last_blocks" in values else PretrainConfig.kind)
    if kind not in CONFIGS:
        raise StatedError(
            f"{origin} is of kind {str(kind)[:80]!r}, which this version does not know (there are: "
            f"{', '.join(CONFIGS)})",
            field="kind",
        )
    fields = {name: tuples(value) for name, value in values.items() if name != "kind"}
    try:
        return dacite.from_dict(CONFIGS[kind], fields, dacite.Config(strict=True))
    except (dacite.DaciteError, ValueError, TypeError) as error:
        raise StatedError(f"{origin} is not a configuration of this version: {error}") from error


def read_config(path: Path) -> Run:
    """The configuration in a file.

    Raises:
      StatedError: there is no such file, or it cannot be read or does not hold one.
    """
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise StatedError(f"{path.parent} is not a run: it has no {path.name}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StatedError(f"{path} is not JSON: {error}") from error
    except OSError as error:
        raise StatedError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(values, dict):
        raise StatedError(f"{path} holds {type(values).__name__}, not a configuration")
    return config_from_dict(values, path)


def find_checkpoint(run_or_checkpoint: str | Path) -> Path:
    """The folder of a checkpoint: the one given, or the newest of the run given.

    Raises:
      StatedError: there is none.
    """
    given = Path(run_or_checkpoint).absolute()
    if (given / RECORD).is_dir():
        return given
    steps = checkpoint_folders(given)
    if not steps:
        raise StatedError(f"{run_or_checkpoint} is neither a run with a checkpoint nor a checkpoint")
    return steps[-1]


def checkpoint_folders(workdir: Path) -> list[Path]:
    """The checkpoints of a run that say what they are, oldest first."""
    found = [child for child in (workdir / CHECKPOINTS).glob("*") if child.name.isdigit()]
    return sorted((child for child in found if (child / RECORD).is_dir()), key=lambda child: int(child.name))


def read_record(checkpoint: Path) -> Record:
    """The configuration of a checkpoint, the fingerprint of each of its arrays, and the size of its data.

    Raises:
      StatedError: the record is missing or damaged.
    """
    try:
        record = json.loads((checkpoint / RECORD / "metadata").read_text())
        config, fingerprint = record["config"], record["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StatedError(f"checkpoint {checkpoint} cannot be read: {type(error).__name__}: {error}") from error
    examples = record.get("examples")
    kinds = {"config": (config, dict), "fingerprint": (fingerprint, dict), "examples": (examples, int | None)}
    for name, (value, kind) in kinds.items():
        if not isinstance(value, kind):
            raise StatedError(f"checkpoint {checkpoint} cannot be read: its record has {name} {str(value)[:80]}")
    return Record(config_from_dict(config, checkpoint), fingerprint, examples)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their whole names, as the command line has them."""
    rows: dict[str, Any] = {}
    for key, value in values.items():
        rows |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return rows


def differences(old: Run, new: Run) -> list[tuple[str, Any, Any]]:
    """List what differs of two runs of one kind in what they compute: (field, old value, new value)."""
    operation = {field.name for field in dataclasses.fields(old.operation)}
    olds, news = flatten(config_to_dict(old)), flatten(config_to_dict(new))
    return [(key, olds[key], news[key]) for key in olds if key not in operation and olds[key] != news[key]]


def _started(workdir: Path) -> tuple[Run | None, int | None]:
    """What the run in a folder was started with, and on how many examples, as far as the folder tells."""
    records = []
    for folder in reversed(checkpoint_folders(workdir)):
        with contextlib.suppress(StatedError):  # a damaged one: restoring will name it
            records.append(read_record(folder))
            break
    examples = records[0].examples if records else None
    file = workdir / CONFIG_FILE
    if not file.exists():
        return records[0].config if records else None, examples
    try:
        return read_config(file), examples
    except StatedError as error:
        advice = "Mend it, or choose another --workdir."
        if records:
            advice = "Remove it, and run the same command again: the checkpoints beside it hold the configuration too."
        raise StatedError(f"{error}. {advice}") from error


def claim(config: Run, examples: int | None = None) -> Path:
    """Make the run's folder, or go on in it if it was started with the same configuration on as many examples
    (where their number is given).

    Raises:
      StatedError: it was started with another one or on other data, or cannot be written to.
    """
    workdir = Path(config.workdir).absolute()
    file = workdir / CONFIG_FILE
    started, had = _started(workdir)
    if started is not None and started.kind != config.kind:
        raise StatedError(
            f"{config.workdir} holds a run of kind {started.kind}, and this is {config.kind}: choose another --workdir."
        )
    if None not in (had, examples) and had != examples:
        raise StatedError(
            f"{config.workdir} was started on {had:,} images, and {config.data} has {examples:,} now. "
            "Bring the data back as it was, or choose another --workdir."
        )
    if started is not None:
        differing = differences(started, config)
        if differing:
            rows = ", ".join(f"{name} {old}, not {new}" for name, old, new in differing)
            has_checkpoint = any((workdir / CHECKPOINTS).glob("*"))
            remove = "" if has_checkpoint else " or remove this one, which has no checkpoint yet"
            raise StatedError(
                f"{config.workdir} was started with {rows}. Continue with those, or choose another --workdir{remove}."
            )
    text = json.dumps(config_to_dict(config), indent=2) + "\n"
    try:
        make_writable(workdir)
        if not file.exists() or file.read_text() != text:  # a full disk does not hinder what need not be written
            write_atomically(file, text)
    except OSError as error:
        raise unwritable(config.workdir, error) from error
    return workdir
