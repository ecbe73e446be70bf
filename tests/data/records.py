"""Prepared records for tests."""

from collections.abc import Callable
from pathlib import Path

from mae_jax.data.prepare import Plan, prepare
from mae_jax.data.sources.records import RecordSource
from mae_jax.data.sources.source import open_source

Make = Callable[..., Path]  # the fixture `make_folder`


def prepared(folder: Path, destination: Path | str, *, workers: int = 0, **changes: object) -> RecordSource:
    """The records of a folder of images."""
    source = open_source(f"folder:{folder}", 3)
    plan = Plan(f"folder:{folder}", "train", len(source), **{"size": 32, "shard_images": 5, **changes})
    prepare(source, plan, str(destination), workers, lambda count: None)
    return RecordSource(str(destination))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
