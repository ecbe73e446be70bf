"""Commands over images."""

import sys
from pathlib import Path
from typing import Literal

import tyro

from mae_jax.commands.progress import progress


def prepare(
    source: tyro.conf.Positional[str],
    destination: tyro.conf.Positional[str],
    /,
    size: int = 256,
    quality: int = 95,
    encoding: Literal["jpeg", "raw", "keep"] = "jpeg",
    channels: Literal[1, 3] = 3,
    split: str = "train",
    shard_images: int = 4096,
    workers: int | None = None,
) -> int:
    """Turn images into records that read fast: mae-jax prepare SOURCE DEST. Run again, it goes on where it stopped.

    Args:
      source: folder:PATH, tfds:NAME[@SPLIT], records:PATH or digits.
      destination: A folder, or any address that fsspec knows; read it by records:DEST.
      size: Pixels: of the shorter side; with encoding raw, of the square that each image is squeezed into.
      quality: Of JPEG, 1 to 100.
      encoding: jpeg shrinks images to size; raw keeps pixels, for --crops device; keep leaves files as they are.
      channels: 3 for colour, 1 for grey.
      split: Of the source.
      shard_images: Images in a file.
      workers: Processes; by default one a core.
    """
    from mae_jax.data.prepare import Plan
    from mae_jax.data.prepare import prepare as write
    from mae_jax.data.sources import open_source
    from mae_jax.data.workers import default_readers

    if workers is not None and workers < 0:
        print(f"mae-jax prepare: workers {workers} must not be negative", file=sys.stderr)
        return 2
    images = open_source(source, channels, split)
    try:
        plan = Plan(source, split, len(images), encoding, size, quality, channels, shard_images)
    except ValueError as error:
        print(f"mae-jax prepare: {error}", file=sys.stderr)
        return 2
    processes = default_readers(images.in_memory) if workers is None else workers
    with progress(len(images)) as tell:
        done = write(images, plan, destination, processes, tell)
    for line in done.broken[:20]:
        print(f"left out: {line}")
    print(
        f"{done.records:,} images, shards: {len(done.shards)}, broken and left out: {len(done.broken)}; "
        f"read them by --data records:{destination}"
    )
    return 0


def inspect(
    data: tyro.conf.Positional[str],
    /,
    sheet: Path = Path("inspect.png"),
    samples: int = 100,
    channels: Literal[1, 3] = 3,
    split: str = "train",
    workers: int | None = None,
) -> int:
    """Count, measure and check a source's images, and draw a sheet of samples: mae-jax inspect DATA.

    Args:
      data: folder:PATH, tfds:NAME[@SPLIT], records:PATH or digits.
      sheet: The picture to write; its ending says which kind.
      samples: Images on it.
      channels: 3 for colour, 1 for grey.
      split: Of the source.
      workers: Processes; by default one a core.
    """
    from mae_jax.atomic import check_picture
    from mae_jax.data.inspect import inspect_source, write_sheet
    from mae_jax.data.sources import open_source
    from mae_jax.data.workers import default_readers

    if workers is not None and workers < 0:
        print(f"mae-jax inspect: workers {workers} must not be negative", file=sys.stderr)
        return 2
    if samples < 0:
        print(f"mae-jax inspect: samples {samples} must not be negative", file=sys.stderr)
        return 2
    check_picture(sheet, "sheet")
    images = open_source(data, channels, split)
    processes = default_readers(images.in_memory) if workers is None else workers
    with progress(len(images)) as tell:
        report = inspect_source(images, data, processes, samples, tell)
    print(report)
    write_sheet(report.tiles, sheet)
    print(f"wrote {sheet}")
    return 1 if report.damaged else 0
