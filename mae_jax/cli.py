"""The command line, one function per command. Frameworks are imported inside them: help must answer at once."""

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import getdoc
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from mae_jax.errors import StatedError

if TYPE_CHECKING:
    from mae_jax.config import PretrainConfig

# Flags that stand for a longer one.
ALIASES = {"--precision": "--model.dtype"}


def _read_config(args: Sequence[str], prog: str) -> "PretrainConfig":
    from mae_jax.config import PretrainConfig
    from mae_jax.presets import PRESETS

    if args and args[0] in PRESETS:
        preset = PRESETS[args[0]]
        description = f"{getdoc(preset)}\n\n--precision stands for --model.dtype; --debug shows tracebacks."
        return tyro.cli(
            PretrainConfig,
            default=preset(),
            args=_unalias(args[1:]),
            prog=f"{prog} {args[0]}",
            description=description,
        )
    # Help, or a word that is no preset.
    recipes = tyro.extras.subcommand_type_from_defaults(
        {name: preset() for name, preset in PRESETS.items()},
        {name: preset.__doc__ or "" for name, preset in PRESETS.items()},
    )
    return tyro.cli(recipes, args=_unalias(args), prog=prog)


def pretrain(args: Sequence[str], prog: str) -> int:
    """Pretrain a masked autoencoder: mae-jax pretrain PRESET [--field value]. Run again, it continues."""
    from mae_jax.train.host_memory import keep_freed_memory

    config = _read_config(args, prog)
    keep_freed_memory()
    _prepare_jax(config.model.dtype)
    from mae_jax.train.hosts import joined
    from mae_jax.train.loop import pretrain

    with joined(config) as hosts:
        finished = pretrain(config, hosts)
    print(f"step {finished.step} is saved in {finished.workdir}")
    if finished.signal is None:
        return 0
    print(f"stopped by {finished.signal.name}; to continue: {shlex.join([*prog.split(), *args])}")
    return 128 + finished.signal


def plan(args: Sequence[str], prog: str) -> int:
    """Say what a run would cost, without running it: mae-jax plan PRESET --engine fsdp --devices 64 --memory 40GiB.

    Every field of `pretrain` is a flag here too; --devices counts all devices of all hosts.
    """
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--memory", default="40GiB")
    parser.add_argument("--flops", type=float, default=1.5e14)
    parser.add_argument("--bandwidth", type=float, default=1e11)
    own, rest = parser.parse_known_args(args)
    config = _read_config(rest, f"{prog} [--memory 40GiB] [--flops 1.5e14] [--bandwidth 1e11]")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={config.devices or 1}"
    os.environ |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    _prepare_jax(config.model.dtype)
    from mae_jax.train.plan import parse_bytes
    from mae_jax.train.plan import plan as make_plan

    print(make_plan(config, parse_bytes(own.memory), own.flops, own.bandwidth))
    return 0


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


def port(
    source: tyro.conf.Positional[str],
    destination: tyro.conf.Positional[Path],
    /,
    to: Literal["fair", "timm", "huggingface", "lightly", "lightly-deprecated", "jax"],
    part: Literal["all", "encoder"] | None = None,
    encoder_heads: int | None = None,
    decoder_heads: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    source_image_size: int | tuple[int, int] | None = None,
    mask_ratio: float | None = None,
    norm_pix_loss: bool | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    verify: bool = True,
    force: bool = False,
) -> int:
    """Carry weights to and from PyTorch libraries: mae-jax port SOURCE DEST --to FORMAT.

    The library that receives them computes the same, or nothing is written.

    Args:
      source: A PyTorch or safetensors file, a Hugging Face folder, a run or checkpoint of this project, or
        hf:OWNER/NAME. Whose layout it has is seen from its keys.
      destination: The file or folder to write.
      to: The library that is to read it.
      part: encoder leaves the decoder out; by default all that the source has.
      encoder_heads: Attention heads, where nothing tells them.
      decoder_heads: The decoder's.
      image_size: Of images to come: sin-cos positions are recomputed, learned ones resized.
      source_image_size: What the source's positions were made for, where it is not a square.
      mask_ratio: Where the source does not say it.
      norm_pix_loss: Where the source does not say it.
      dtype: Of the file.
      verify: Run the same images and noise through this project's model and the receiving library's.
      force: Replace what is at the destination.
    """
    import signal

    from mae_jax.port.inference import Hints
    from mae_jax.port.port import port

    # As Ctrl-C does: what is half written is removed on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if (Path(source) / "checkpoints").is_dir() or (Path(source) / "record").is_dir():
        _prepare_jax(_precision(Path(source)))
    hints = Hints(encoder_heads, decoder_heads, source_image_size, mask_ratio, norm_pix_loss)
    port(source, destination, to, part=part, hints=hints, image_size=image_size, dtype=dtype, check=verify, force=force)
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
    "plan": plan,
    "reconstruct": _tyro_command(reconstruct),
    "knn": _tyro_command(knn),
    "port": _tyro_command(port),
    "prepare": _tyro_command(prepare),
    "inspect": _tyro_command(inspect),
}


def _unalias(args: Sequence[str]) -> list[str]:
    """Short flags to the long ones that they stand for, with and without `=`."""
    split = [arg.partition("=") for arg in args]
    return [ALIASES.get(flag, flag) + equals + value for flag, equals, value in split]


def _precision(run: Path) -> str:
    from mae_jax.train.workdir import find_checkpoint, read_record

    return read_record(find_checkpoint(run)).config.model.dtype


def _prepare_jax(dtype: str) -> None:
    """Settings that JAX takes before its first array."""
    import jax

    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 done, 1 a stated failure, 2 wrong usage, 143 or 130 stopped by SIGTERM or Ctrl-C."""
    code = _main(argv)
    if code and "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        # One of several hosts that has failed: at a regular exit it and the others would wait for each other.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _main(argv: Sequence[str] | None) -> int:
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
            traceback.print_exc()
            return 1
        stated = isinstance(error, StatedError)
        print(
            f"mae-jax: {error}" if stated else f"mae-jax: {type(error).__name__}: {error} (--debug shows where)",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
