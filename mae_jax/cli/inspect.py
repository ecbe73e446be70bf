"""Count, measure and check the images of a source."""

import sys
from pathlib import Path
from typing import Literal

import tyro

from mae_jax.cli.flags import command, progress


@command
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
      workers: Processes; by default one a core, 0: threads of this one.
    """
    from mae_jax.data.images.decode import prepare_decoder
    from mae_jax.data.inspect import inspect_source, write_sheet
    from mae_jax.data.loader import default_readers
    from mae_jax.data.sources.source import open_source
    from mae_jax.files import check_picture

    if workers is not None and workers < 0:
        print(f"mae-jax inspect: workers {workers} must not be negative", file=sys.stderr)
        return 2
    if samples < 0:
        print(f"mae-jax inspect: samples {samples} must not be negative", file=sys.stderr)
        return 2
    check_picture(sheet, "sheet")
    prepare_decoder()
    images = open_source(data, channels, split)
    processes = default_readers(images.in_memory) if workers is None else workers
    with progress(len(images)) as done:
        report = inspect_source(images, data, processes, samples, done)
    print(report)
    write_sheet(report.tiles, sheet)
    print(f"wrote {sheet}")
    return 1 if report.damaged else 0
