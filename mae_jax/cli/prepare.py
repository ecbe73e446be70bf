"""Turn images into records that read fast."""

import sys
from typing import Literal

import tyro

from mae_jax.cli.flags import command, progress


@command
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
      workers: Processes; by default one a core, 0: threads of this one.
    """
    from mae_jax.data.images.decode import prepare_decoder
    from mae_jax.data.loader import default_readers
    from mae_jax.data.prepare import Plan
    from mae_jax.data.prepare import prepare as write
    from mae_jax.data.sources.source import open_source

    if workers is not None and workers < 0:
        print(f"mae-jax prepare: workers {workers} must not be negative", file=sys.stderr)
        return 2
    prepare_decoder()
    images = open_source(source, channels, split)
    try:
        plan = Plan(source, split, len(images), encoding, size, quality, channels, shard_images)
    except ValueError as error:
        print(f"mae-jax prepare: {error}", file=sys.stderr)
        return 2
    processes = default_readers(images.in_memory) if workers is None else workers
    with progress(len(images)) as report:
        done = write(images, plan, destination, processes, report)
    for line in done.broken[:20]:
        print(f"left out: {line}")
    print(
        f"{done.records:,} images, shards: {len(done.shards)}, broken and left out: {len(done.broken)}; "
        f"read them by --data records:{destination}"
    )
    return 0
