"""The command line, one function per command. Frameworks are imported inside them: help must answer at once."""

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import getdoc
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import tyro

from mae_jax.errors import StatedError

if TYPE_CHECKING:
    from mae_jax.config import FinetuneConfig, PretrainConfig
    from mae_jax.train.loop import Finished

# Flags that stand for a longer one.
ALIASES = {"--precision": "--model.dtype"}


Config = TypeVar("Config", "PretrainConfig", "FinetuneConfig")


def _read_config(
    args: Sequence[str],
    prog: str,
    kind: "type[Config]",
    presets: "Mapping[str, Callable[[], Config]]",
    adopt: "Callable[[Config, str], Config] | None" = None,
) -> "Config":
    """The configuration of a command line that begins with the name of a preset.

    adopt: puts into the preset what the weights say that `--init` names; flags go before it.
    """
    if args and args[0] in presets:
        preset = presets[args[0]]
        words = _unalias(args[1:])
        default = preset()
        if adopt is not None:
            first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            first.add_argument("--init")
            if init := first.parse_known_args(words)[0].init:
                default = adopt(default, init)
        description = f"{getdoc(preset)}\n\n--precision stands for --model.dtype; --debug shows tracebacks."
        return tyro.cli(kind, default=default, args=words, prog=f"{prog} {args[0]}", description=description)
    # Help, or a word that is no preset.
    recipes = tyro.extras.subcommand_type_from_defaults(
        {name: preset() for name, preset in presets.items()},
        {name: preset.__doc__ or "" for name, preset in presets.items()},
    )
    return tyro.cli(recipes, args=_unalias(args), prog=prog)


def _read_pretraining(args: Sequence[str], prog: str) -> "PretrainConfig":
    from mae_jax.config import PretrainConfig
    from mae_jax.presets import PRESETS

    return _read_config(args, prog, PretrainConfig, PRESETS)


def _ended(finished: "Finished", args: Sequence[str], prog: str) -> int:
    """Say how a run ended, and the exit code for it."""
    print(f"step {finished.step} is saved in {finished.workdir}")
    if finished.signal is None:
        return 0
    print(f"stopped by {finished.signal.name}; to continue: {shlex.join([*prog.split(), *args])}")
    return 128 + finished.signal


def pretrain(args: Sequence[str], prog: str) -> int:
    """Pretrain a masked autoencoder: mae-jax pretrain PRESET [--field value]. Run again, it continues."""
    from mae_jax.train import cpu

    config = _read_pretraining(args, prog)
    cpu.settle(config.model, config.batch_size // config.accumulate)
    _prepare_jax(config.model.dtype)
    from mae_jax.train.compiled import keep_compiled
    from mae_jax.train.hosts import joined
    from mae_jax.train.pretrain import pretrain

    keep_compiled()
    with joined(config) as hosts:
        finished = pretrain(config, hosts)
    return _ended(finished, args, prog)


def finetune(args: Sequence[str], prog: str) -> int:
    """Fine-tune an encoder with a head: mae-jax finetune PRESET --init RUN_OR_CHECKPOINT [--eval-only]."""
    from mae_jax.presets import FINETUNE

    return _transfer(args, prog, FINETUNE)


def probe(args: Sequence[str], prog: str) -> int:
    """Train linear heads on a frozen encoder: mae-jax probe PRESET --init RUN_OR_CHECKPOINT [--sweep RATES]."""
    from mae_jax.presets import PROBE

    return _transfer(args, prog, PROBE)


def _transfer(args: Sequence[str], prog: str, presets: "Mapping[str, Callable[[], FinetuneConfig]]") -> int:
    from mae_jax.config import FinetuneConfig
    from mae_jax.train import cpu

    def adopt(config: FinetuneConfig, init: str) -> FinetuneConfig:
        from mae_jax.train.initial import adopted

        return adopted(config, init)

    words = [word for word in args if word != "--eval-only"]
    config = _read_config(words, f"{prog} [--eval-only]", FinetuneConfig, presets, adopt)
    cpu.settle(config.model, config.batch_size // config.accumulate)
    _prepare_jax(config.model.dtype)
    from mae_jax.train.compiled import keep_compiled
    from mae_jax.train.finetune import EVALUATED, evaluate, finetune
    from mae_jax.train.hosts import joined

    keep_compiled()
    with joined(config) as hosts:
        if len(words) < len(args):
            outcomes = evaluate(config, hosts)
            top1, top5 = outcomes.top(1)[0], outcomes.top(5)[0]
            left_out = f"; {outcomes.left_out} left out" if outcomes.left_out else ""
            if hosts.first:
                print(f"top-1 {top1:.2%}, top-5 {top5:.2%} of {len(outcomes.label):,} images{left_out}")
                print(f"wrote confusion.png and worst.png into {config.workdir}/{EVALUATED}")
            return 0
        finished = finetune(config, hosts)
    return _ended(finished, args, prog)


def plan(args: Sequence[str], prog: str) -> int:
    """Say what a run would cost, without running it: mae-jax plan PRESET --engine fsdp --devices 64 --memory 40GiB.

    Every field of `pretrain` is a flag here too; --devices counts all devices of all hosts.
    """
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--memory", default="40GiB")
    parser.add_argument("--flops", type=float, default=1.5e14)
    parser.add_argument("--bandwidth", type=float, default=1e11)
    own, rest = parser.parse_known_args(args)
    config = _read_pretraining(rest, f"{prog} [--memory 40GiB] [--flops 1.5e14] [--bandwidth 1e11]")
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


def features(
    source: tyro.conf.Positional[str],
    data: tyro.conf.Positional[str],
    /,
    out: Path,
    split: str = "train",
    pooling: Literal["mean", "class"] = "mean",
    block: int | None = None,
    encoder_heads: int | None = None,
    batch_size: int = 256,
) -> int:
    """Write an encoder's features of all images of a source: mae-jax features SOURCE DATA --out x.npz.

    The file holds the arrays features (float32), labels, class_names, names, and of (JSON: what they are features of).

    Args:
      source: A work directory, one checkpoint in it, or a PyTorch checkpoint that `mae-jax port` reads.
      data: folder:PATH, tfds:NAME[@SPLIT], records:PATH or digits.
      out: The file to write, .npz.
      split: train or val.
      pooling: The mean of the patches' tokens, or the class token.
      block: As they leave this block, counted from 0 or back from -1; by default after the last LayerNorm.
      encoder_heads: Attention heads, where a PyTorch checkpoint does not tell them.
      batch_size: Images at a time, spread over the devices of this host.
    """
    _prepare_jax_for(source)
    from mae_jax.data.sources import absolute, open_source
    from mae_jax.evaluation.encoders import load_pretrained
    from mae_jax.evaluation.feature_files import FeatureFile, check_writable, save_features
    from mae_jax.evaluation.features import check_features, source_features

    if batch_size < 1:
        print(f"mae-jax features: batch_size {batch_size} must be positive", file=sys.stderr)
        return 2
    check_writable(out)
    read = load_pretrained(source, encoder_heads)
    check_features(read.params, read.model, pooling, block)
    images = open_source(data, read.model.in_channels, split)
    with _progress(len(images)) as tell:
        found = source_features(
            read.params, images, read.model, read.augment, pooling, batch_size, block=block, tell=tell
        )
    broken = set(found.broken.tolist())
    names = tuple(images.name(index) for index in range(len(images)) if index not in broken)
    of = {
        "source": read.source,
        "step": read.step,
        "pooling": pooling,
        "block": None if block is None else block % read.model.encoder.depth,
        "data": absolute(data),
        "split": split,
    }
    save_features(out, FeatureFile(found.values, found.labels, images.class_names, names, of))
    for index in found.broken[:20].tolist():
        print(f"left out: {images.name(index)} does not decode")
    left = f"; {len(broken):,} do not decode and are left out" if broken else ""
    print(f"wrote {out}: {len(found.values):,} images x {found.values.shape[1]}{left}")
    return 0


def knn(
    source: tyro.conf.Positional[str],
    /,
    data: str | None = None,
    queries: Path | None = None,
    k: int = 20,
    temperature: float | None = 0.07,
    pooling: Literal["mean", "class"] = "mean",
    encoder_heads: int | None = None,
) -> int:
    """Score an encoder's features by nearest neighbours, beside the same encoder untrained: mae-jax knn SOURCE.

    Or score features that are there: mae-jax knn bank.npz --queries val.npz.

    Args:
      source: A work directory, one checkpoint in it, a PyTorch checkpoint that `mae-jax port` reads, or a file of
        `mae-jax features`.
      data: A source with classes; by default what the run was trained on. Images of its split `val` are looked up
        among those of `train`; where there is no `val`, each image of `train` among the others.
      queries: A second file of `mae-jax features`, looked up among the first.
      k: Neighbours; 200 is the Lightly benchmark's setting.
      temperature: Of the vote, exp(similarity / temperature); None counts each neighbour once.
      pooling: The mean of the patches' tokens, or the class token; a file of features has its own.
      encoder_heads: Attention heads, where a PyTorch checkpoint does not tell them.
    """
    from mae_jax.errors import StatedError

    if source.endswith(".npz"):
        if data is not None:
            raise StatedError(f"data {data} is for an encoder: {source} holds features, look up others by --queries")
        from mae_jax.evaluation.knn import compare_files

        print(compare_files(Path(source), queries, k=k, temperature=temperature))
        return 0
    if queries is not None:
        raise StatedError(f"queries {queries} is to be looked up in a file of features, and {source} is none (.npz)")
    _prepare_jax_for(source)
    from mae_jax.evaluation.knn import compare_with_untrained

    print(
        compare_with_untrained(source, data, k=k, temperature=temperature, pooling=pooling, encoder_heads=encoder_heads)
    )
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
    _prepare_jax_for(source)
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


def bench(
    model: tyro.conf.Positional[str],
    /,
    batches: tuple[int, ...] = (64,),
    dtype: Literal["float32", "bfloat16", "float64"] = "float32",
    mask_tokens: Literal["none", "encoder", "both"] = "none",
    remat: bool = False,
    attention: Literal["xla", "cudnn"] = "xla",
    steps: int = 30,
    warmup: int = 3,
    json: bool = False,
) -> int:
    """Time the training step on one device: mae-jax bench MODEL --batches 256 --dtype bfloat16.

    Medians, FLOP/s from the model's definition, and their share of what the device multiplies at its best.

    Args:
      model: vit_small_patch16, vit_base_patch16, vit_large_patch16, vit_huge_patch14, or the model of a preset.
      batches: Images in a step; several are timed in a process each.
      dtype: Of matrix products.
      mask_tokens: The encoder sees mask tokens (the paper's Table 1c), or not, or both one after the other.
      remat: Recompute each block in the backward pass.
      attention: What computes it; cudnn needs an NVIDIA GPU and bfloat16.
      steps: Timed steps.
      warmup: Steps before them.
      json: Print a line of JSON for each row in place of the table.
    """
    from mae_jax.bench.setting import bench_config
    from mae_jax.train import cpu

    if len(batches) == 1 and mask_tokens != "both":  # else in the processes that time, which inherit the environment
        timed = bench_config(model, batches[0], dtype, mask_tokens == "encoder", remat, attention)
        cpu.settle(timed.model, timed.batch_size)
    _prepare_jax(dtype)
    from mae_jax.bench.run import rows, show

    return show(rows(model, batches, dtype, mask_tokens, remat, attention, steps, warmup), model, json)


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
    "finetune": finetune,
    "probe": probe,
    "plan": plan,
    "reconstruct": _tyro_command(reconstruct),
    "features": _tyro_command(features),
    "knn": _tyro_command(knn),
    "port": _tyro_command(port),
    "prepare": _tyro_command(prepare),
    "inspect": _tyro_command(inspect),
    "bench": _tyro_command(bench),
}


def _unalias(args: Sequence[str]) -> list[str]:
    """Short flags to the long ones that they stand for, with and without `=`."""
    split = [arg.partition("=") for arg in args]
    return [ALIASES.get(flag, flag) + equals + value for flag, equals, value in split]


def _precision(run: Path) -> str:
    from mae_jax.train.workdir import find_checkpoint, read_record

    return read_record(find_checkpoint(run)).config.model.dtype


def _prepare_jax_for(source: str) -> None:
    """In a run's own precision; anything else is computed in float32."""
    from mae_jax.port.reading import is_run

    _prepare_jax(_precision(Path(source)) if is_run(source) else "float32")


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
