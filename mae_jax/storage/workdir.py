"""A run's folder: config.json, checkpoints/, metrics.jsonl, tensorboard/, and what is drawn into it.

Who may write there: one run at a time, of one configuration, the same on all its hosts.
"""

import contextlib
import dataclasses
import errno
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import dacite

from mae_jax.config import FinetuneConfig, PretrainConfig, Run
from mae_jax.errors import StatedError
from mae_jax.files import Hold, hold, local_path, read_json, write_atomically

if TYPE_CHECKING:
    from mae_jax.hosts import Hosts

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
RECORD = "record"  # the folder of a checkpoint's metadata: what `Record` holds

CONFIGS: dict[str, type[Run]] = {config.kind: config for config in (PretrainConfig, FinetuneConfig)}


class Record(NamedTuple):
    """The metadata of a checkpoint."""

    config: Run
    fingerprint: dict[str, int]  # of each array
    examples: int | None  # how many the run's data had; None where there was no run
    version: int  # of the fingerprint
    step: int | None  # of the run; None where there was no run, and in version 0.1.0


def make_writable(folder: Path) -> None:
    """Make a folder where it is missing; OSError where it cannot be written to, though not where the disk is full."""
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)  # needs no room


def unwritable(workdir: str, error: OSError) -> StatedError:
    """Give the error for a work directory where the system gave this one."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = "make room, and run the same command again" if full else "choose another"
    return StatedError(f"workdir {workdir} cannot be written to ({error.strerror}): {advice}", field="workdir")


def config_to_dict(config: Run) -> dict[str, Any]:
    """Take a configuration apart into what JSON can hold, the way it comes back: its kind, tuples as lists."""
    return {"kind": config.kind} | json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_dict(values: dict[str, Any], origin: object) -> Run:
    """Build the configuration that `config_to_dict` took apart; unknown fields and other types are refused.

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
        raise StatedError(f"{origin} is not a configuration of this version: {error}", field=CONFIG_FILE) from error


def read_config(path: Path) -> Run:
    """Read the configuration in a file.

    Raises:
      StatedError: there is no such file, or it cannot be read or does not hold one.
    """
    try:
        values = read_json(path, CONFIG_FILE)
    except FileNotFoundError as error:
        raise StatedError(f"{path.parent} is not a run: it has no {path.name}", field=CONFIG_FILE) from error
    except OSError as error:
        raise StatedError(f"{path} cannot be read: {error.strerror}", field=CONFIG_FILE) from error
    if not isinstance(values, dict):
        raise StatedError(f"{path} holds {type(values).__name__}, not a configuration", field=CONFIG_FILE)
    return config_from_dict(values, path)


def find_checkpoint(run_or_checkpoint: str | Path) -> Path:
    """Find the folder of a checkpoint: the one given, or the newest of the run given.

    Raises:
      StatedError: there is none.
    """
    given = Path(run_or_checkpoint).absolute()
    if (given / RECORD).is_dir():
        return given
    steps = checkpoint_folders(given)
    if not steps:
        raise StatedError(
            f"{run_or_checkpoint} is neither a run with a checkpoint nor a checkpoint", field="checkpoint"
        )
    return steps[-1]


def checkpoint_folders(workdir: Path) -> list[Path]:
    """List the checkpoints of a run that have a record, oldest first."""
    return [folder for folder in numbered(workdir) if (folder / RECORD).is_dir()]


def numbered(workdir: Path) -> list[Path]:
    """List whatever has a number for its name among the checkpoints of a run, lowest first."""
    found = [child for child in (workdir / CHECKPOINTS).glob("*") if child.name.isdecimal()]
    return sorted(found, key=lambda child: int(child.name))


def read_record(checkpoint: Path) -> Record:
    """Read the metadata of a checkpoint.

    Raises:
      StatedError: it is missing or damaged, or cannot be read.
    """
    try:
        record = read_json(checkpoint / RECORD / "metadata", RECORD)
        found = record["config"], record["fingerprint"], *map(record.get, ("examples", "version", "step"))
    except (StatedError, OSError, KeyError, TypeError, AttributeError) as error:
        why = str(error) if isinstance(error, StatedError) else f"{type(error).__name__}: {error}"
        raise StatedError(f"checkpoint {checkpoint} cannot be read: {why}", field=RECORD) from error
    kinds = {"config": dict, "fingerprint": dict, "examples": int | None, "version": int | None, "step": int | None}
    for (name, kind), value in zip(kinds.items(), found, strict=True):
        if not isinstance(value, kind):
            raise StatedError(
                f"checkpoint {checkpoint} cannot be read: its record has {name} {str(value)[:80]}", field=RECORD
            )
    config, fingerprint, examples, version, step = found
    return Record(config_from_dict(config, checkpoint), fingerprint, examples, version or 1, step)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give nested fields their whole names, as the command line has them."""
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
    """Read what the run in a folder was started with, and on how many examples, as far as the folder has it."""
    records = []
    for folder in reversed(checkpoint_folders(workdir)):
        with contextlib.suppress(StatedError):  # a damaged one: restoring will name it
            records.append(read_record(folder))
            break
    examples = records[0].examples if records else None
    file = workdir / CONFIG_FILE
    lost = not file.exists()
    if file.is_file():
        with contextlib.suppress(OSError), file.open("rb") as content:
            lost = not content.read(2**16).strip(b"\0")  # a power cut took a file that was not yet on the disk
    if lost:
        return records[0].config if records else None, examples
    try:
        return read_config(file), examples
    except StatedError as error:
        advice = "Mend it, or choose another --workdir."
        if records:
            advice = "Remove it, and run the same command again: the checkpoints beside it hold the configuration too."
        raise StatedError(f"{error}. {advice}", field=error.field) from error


def claim(config: Run, examples: int | None = None, report: Callable[[str], None] = print) -> Path:
    """Make the run's folder, or go on in it if it was started with the same configuration on as many examples.

    A configuration binds from the first row or checkpoint on: one that failed before is replaced, after a word to
    `report`.

    Raises:
      StatedError: it was started with another one or on other data, or cannot be written to.
    """
    workdir = local_path(config.workdir, "workdir")
    file = workdir / CONFIG_FILE
    started, had = _started(workdir)
    saved, metrics = bool(numbered(workdir)), workdir / METRICS_FILE
    binds = saved or (metrics.exists() and metrics.stat().st_size > 0)
    if started is not None and binds:
        _check_same(config, examples, started, had, saved)
    elif started is not None and (started.kind != config.kind or differences(started, config)):
        report(f"{config.workdir} was claimed by a run that made no step; it is this run's now")
    text = json.dumps(config_to_dict(config), indent=2) + "\n"
    try:
        make_writable(workdir)
        if not file.exists() or file.read_text() != text:  # a full disk does not hinder what need not be written
            write_atomically(file, text)
    except OSError as error:
        raise unwritable(config.workdir, error) from error
    return workdir


def _check_same(config: Run, examples: int | None, started: Run, had: int | None, saved: bool) -> None:
    """Compare a run with the one that its folder was started by; `saved`: whether that has a checkpoint."""
    if started.kind != config.kind:
        raise StatedError(
            f"{config.workdir} holds a run of kind {started.kind}, and this is {config.kind}: choose another "
            "--workdir.",
            field="kind",
        )
    if None not in (had, examples) and had != examples:
        raise StatedError(
            f"{config.workdir} was started on {had:,} images, and {config.data} has {examples:,} now. "
            "Bring the data back as it was, or choose another --workdir.",
            field="data",
        )
    if differing := differences(started, config):
        rows = ", ".join(f"{name} {old}, not {new}" for name, old, new in differing)
        remove = "" if saved else " or remove this one, which has no checkpoint yet"
        raise StatedError(
            f"{config.workdir} was started with {rows}. Continue with those, or choose another --workdir{remove}.",
            field=differing[0][0],
        )


@contextlib.contextmanager
def claimed(
    hosts: "Hosts", config: Run, examples: int | None = None, report: Callable[[str], None] = print
) -> Iterator[tuple[Path, Hold | None]]:
    """Hold the run's folder and `claim` it, by the first host; the others must see what it wrote.

    In this order: lock the folder, read what was started there, compare, write config.json, let the other hosts look
    for a file of this start. Gives the folder, and to the first host what holds it.

    Raises:
      StatedError: as `claim`; another process holds it; or the folder is not the same on all hosts.
    """
    workdir = local_path(config.workdir, "workdir")
    # A name of this start's own: config.json may be left on a disk that is not shared from a run before.
    sign = workdir / f".hosts-{hosts.gather('start', uuid.uuid4().hex)[0]}"
    with contextlib.ExitStack() as stack:
        held = None
        if hosts.first:
            try:
                make_writable(workdir)
                held = stack.enter_context(hold(workdir, "workdir", report))
            except OSError as error:
                raise unwritable(config.workdir, error) from error
            claim(config, examples, report)
            if hosts.count > 1:
                sign.touch()
        hosts.gather("claimed", "")
        seen = hosts.gather("seen", str(hosts.count == 1 or sign.exists()))
        if hosts.first:
            sign.unlink(missing_ok=True)
        blind = [str(host) for host, one in enumerate(seen) if one == "False"]
        if blind:
            raise StatedError(
                f"workdir {config.workdir} of host 0 is not what host {', '.join(blind)} sees under this name: "
                "give a --workdir on storage that all hosts share",
                field="workdir",
            )
        yield workdir, held
