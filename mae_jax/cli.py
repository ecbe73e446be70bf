"""The command line, one function per command. Frameworks are imported inside them: help must answer at once."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import tyro

from mae_jax.errors import StatedError

# Flags that stand for a longer one.
ALIASES = {"--precision": "--model.dtype"}


def pretrain(args: Sequence[str], prog: str) -> int:
    """Pretrain a masked autoencoder: mae-jax pretrain PRESET [--field value]. Run again, it continues."""
    from mae_jax.config import PretrainConfig
    from mae_jax.presets import PRESETS
    from mae_jax.train.host_memory import keep_freed_memory

    recipes = tyro.extras.subcommand_type_from_defaults(
        {name: preset() for name, preset in PRESETS.items()},
        {name: preset.__doc__ or "" for name, preset in PRESETS.items()},
    )
    config: PretrainConfig = tyro.cli(
        recipes, args=_unalias(args), prog=prog, config=(tyro.conf.OmitSubcommandPrefixes,)
    )
    keep_freed_memory()
    _prepare_jax(config.model.dtype)
    from mae_jax.train.loop import pretrain

    finished = pretrain(config)
    print(f"step {finished.step} is saved in {finished.workdir}")
    if finished.signal is None:
        return 0
    print(f"stopped by {finished.signal.name}; to continue: {prog} {' '.join(args)}")
    return 128 + finished.signal


def reconstruct(
    run: tyro.conf.Positional[Path],
    images: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    out: Path = Path("grid.png"),
    mask_ratio: float | None = None,
    seed: int = 0,
    samples: int = 8,
) -> int:
    """Draw what a model makes of hidden patches: mae-jax reconstruct RUN_OR_CHECKPOINT [IMAGES...] --out grid.png.

    Args:
      run: A work directory, or one checkpoint in it.
      images: Image files; without any, samples of the data that the run was trained on.
      out: The picture to write; its ending says which kind.
      mask_ratio: Share of patches to hide; by default the run's own.
      seed: Of the masks, and of the choice of samples.
      samples: How many, where no files are given.
    """
    _prepare_jax(_precision(run))
    from mae_jax.evaluation.gallery import reconstruction_sheet, save_picture

    save_picture(reconstruction_sheet(run, images, mask_ratio=mask_ratio, seed=seed, samples=samples), out)
    print(f"wrote {out}")
    return 0


def knn(
    run: tyro.conf.Positional[Path],
    /,
    data: str | None = None,
    k: int = 20,
    temperature: float | None = 0.07,
    pooling: Literal["mean", "class"] = "mean",
) -> int:
    """Score an encoder's features by nearest neighbours, beside the same encoder before training: mae-jax knn RUN.

    Args:
      run: A work directory, or one checkpoint in it.
      data: A source with classes; by default what the run was trained on. Images of its split `val` are looked up
        among those of `train`; where there is no `val`, each image of `train` among the others.
      k: Neighbours.
      temperature: Of the vote, exp(similarity / temperature); None counts each neighbour once.
      pooling: The mean of the patches' tokens, or the class token.
    """
    _prepare_jax(_precision(run))
    from mae_jax.evaluation.knn import compare_with_untrained

    print(compare_with_untrained(run, data, k=k, temperature=temperature, pooling=pooling))
    return 0


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

    images = open_source(source, channels, split)
    try:
        plan = Plan(source, split, len(images), encoding, size, quality, channels, shard_images)
    except ValueError as error:
        print(f"mae-jax prepare: {error}", file=sys.stderr)
        return 2
    processes = default_readers(images.in_memory) if workers is None else workers
    with _progress(len(images)) as tell:
        done = write(images, plan, destination, processes, tell)
    for line in done.broken[:20]:
        print(f"left out: {line}")
    print(
        f"{done.records:,} images in {len(done.shards)} shards, {len(done.broken)} broken ones left out; "
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
    from mae_jax.data.inspect import inspect_source, write_sheet
    from mae_jax.data.sources import open_source
    from mae_jax.data.workers import default_readers

    images = open_source(data, channels, split)
    processes = default_readers(images.in_memory) if workers is None else workers
    with _progress(len(images)) as tell:
        report = inspect_source(images, data, processes, samples, tell)
    print(report)
    write_sheet(report.tiles, sheet)
    print(f"wrote {sheet}")
    return 1 if report.damaged else 0


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over images, where somebody is looking."""
    from tqdm import tqdm

    with tqdm(total=total, unit="image", unit_scale=True, dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        yield bar.update


def _tyro_command(function: Callable[..., int]) -> Callable[[Sequence[str], str], int]:
    def command(args: Sequence[str], prog: str) -> int:
        return tyro.cli(function, args=args, prog=prog)

    command.__doc__ = function.__doc__
    return command


COMMANDS: dict[str, Callable[[Sequence[str], str], int]] = {
    "pretrain": pretrain,
    "reconstruct": _tyro_command(reconstruct),
    "knn": _tyro_command(knn),
    "prepare": _tyro_command(prepare),
    "inspect": _tyro_command(inspect),
}


def _unalias(args: Sequence[str]) -> list[str]:
    """Short flags to the long ones that they stand for, with and without `=`."""
    split = [arg.partition("=") for arg in args]
    return [ALIASES.get(flag, flag) + equals + value for flag, equals, value in split]


def _precision(run: Path) -> str:
    from mae_jax.train.workdir import find_checkpoint, read_record

    return read_record(find_checkpoint(run))[0].model.dtype


def _prepare_jax(dtype: str) -> None:
    """Settings that JAX takes before its first array."""
    import jax

    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 done, 1 a stated failure, 2 wrong usage, 143 or 130 stopped by SIGTERM or Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    summaries = "\n".join(
        f"  {name:12} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()
    )
    parser = argparse.ArgumentParser(
        prog="mae-jax",
        description="Masked Autoencoder pretraining in JAX/Flax.",
        epilog=f"commands:\n{summaries}\n\nmae-jax COMMAND --help tells more; --debug shows tracebacks.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    command = parser.parse_args(words[:1]).command
    try:
        return COMMANDS[command]([word for word in words[1:] if word != "--debug"], f"mae-jax {command}")
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os._exit(1)
    except Exception as error:
        if debug:
            raise
        stated = isinstance(error, StatedError)
        print(
            f"mae-jax: {error}" if stated else f"mae-jax: {type(error).__name__}: {error} (--debug shows where)",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
