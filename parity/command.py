"""The command `python -m parity`: compare mae_jax with the PyTorch reference, stage by stage."""

import contextlib
import io
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from mae_jax.config import MODELS as PUBLISHED
from parity.models import MODELS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parity.bounds import Precision
    from parity.report import Report


@dataclass(frozen=True)
class Arguments:
    """Compare mae_jax with a PyTorch reference from bytes to a trained model, in the order data flows."""

    model: Literal[tuple(MODELS)] | None = None  # type: ignore[valid-type]
    """What to compare: all small ones by default, tiny_square with a peer. Published sizes take minutes on a CPU."""
    dtype: Literal["float32", "float64", "both"] = "both"
    run: str | None = None
    """What was trained: a run, a checkpoint, or any file or folder that `mae-jax port` reads, with its own weights."""
    data: str | None = None
    """With --run: images of this source (folder:PATH ...), by default of what the run was trained on."""
    encoder_heads: int | None = None
    """With --run: attention heads of the encoder, where they are neither in the file nor known by its width."""
    preset: str | None = None
    """A recipe of `mae-jax pretrain`, with its model, normalisation and optimizer."""
    peer: Literal["huggingface", "timm", "lightly", "lightly-deprecated"] | None = None
    """Compare with this library's own model in place of the reference: forward pass, loss, gradients."""
    stages: tuple[str, ...] = ()
    """Only these (images, patchify, masks, encoder_blocks, gradients ...); all by default."""
    stop_at_first: bool = False
    """Leave out all that follows the first stage that departs."""
    seed: int = 0
    """Of the weights, images and noise."""
    batch_size: int | None = None
    """Images, an even number: half on each of two devices. 4 for the small models, 2 for the others by default."""
    device: Literal["cpu", "gpu", "tpu"] | None = None
    """Where this project's side is computed; the reference runs on the CPU. By default what JAX finds."""
    report: Path | None = None
    """Write parity.json, parity.md and parity.png into this folder."""


def compare(arguments: Arguments, precision: "Precision", stages: "Sequence[str]") -> "Report":
    """Run the stages at one precision, printing a row as each is done."""
    from parity.models import SMALL, SQUARE
    from parity.peers import run as run_peer
    from parity.report import COLUMNS, Report, line, rows
    from parity.sides import Reference
    from parity.stages import run

    seed, stop = arguments.seed, arguments.stop_at_first
    if arguments.run is not None or arguments.preset is not None:
        from parity.trained import compare_subject, of_preset, of_source

        batch_size = arguments.batch_size or 2
        if arguments.run is not None:
            subject = of_source(arguments.run, arguments.data, 20 * batch_size, arguments.encoder_heads)
        else:
            subject = of_preset(str(arguments.preset))
        title, configs = subject.name, {subject.name: subject.config}
        for note in subject.notes:
            print(f"note: {note}", flush=True)
        found = compare_subject(subject, precision, seed, batch_size, arguments.stages, stop)
    else:
        if arguments.peer is not None:
            names = [arguments.model or "tiny_square"]
        else:
            names = [arguments.model] if arguments.model else list(SMALL)
        small = SMALL | SQUARE
        sizes = {name: arguments.batch_size or (4 if name in small else 2) for name in names}
        references = [Reference(MODELS[name], precision, seed, sizes[name], name) for name in names]
        title = ", ".join(names) + (f" against {arguments.peer}" if arguments.peer else "")
        configs = {reference.name: reference.config for reference in references}
        found = run_peer(arguments.peer, references[0]) if arguments.peer else run(references, stages, stop)
    report = Report.begin(title, precision, seed, configs)

    print(f"{title}, {precision}\n{line(COLUMNS)}", flush=True)
    for results in found:
        report.results += results
        for row in rows(results):
            print(line(row), flush=True)
    print(report.verdict() + "\n", flush=True)
    return report


def prepare_process(small: bool) -> None:
    """Keep compiled programs for the next time; tiny products are no work for several threads."""
    import torch

    from mae_jax.cli.process import keep_programs

    keep_programs(0.0)  # every operation that is run by itself is a small program
    if small:
        torch.set_num_threads(1)


def compare_apart(arguments: Arguments, precision: "Precision", stages: "Sequence[str]") -> "tuple[Report, str]":
    """Run the stages in a process of their own: the report, and what was printed."""
    prepare_process(small=True)
    if arguments.peer is not None:
        from parity.peers import declare_torchvision_operators

        declare_torchvision_operators()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        report = compare(arguments, precision, stages)
    return report, printed.getvalue()


def find_platform(asked: str | None) -> str | None:
    """Return where JAX computes: cpu, gpu or tpu. Where what is asked for is not there, print that and return None."""
    import jax

    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError):
        print(f"--device {asked}: JAX finds none here. Leave it out, or install JAX for it", file=sys.stderr)
        return None


def wrong_usage(message: str) -> int:
    """Print what is wrong, and return the exit code for it."""
    print(message, file=sys.stderr)
    return 2


def main() -> int:
    """Return 0 where everything agrees, 1 where something departs, 2 on wrong usage."""
    if sys.argv[1:2] == ["trace"]:
        from parity.tracing.modules import TraceArguments, trace_command

        return trace_command(tyro.cli(TraceArguments, args=sys.argv[2:], prog="python -m parity trace"))
    arguments = tyro.cli(Arguments, prog="python -m parity")
    if arguments.batch_size is not None and (arguments.batch_size < 2 or arguments.batch_size % 2):
        return wrong_usage(f"--batch-size {arguments.batch_size} is not a positive even number")
    if not 0 <= arguments.seed < 2**32:
        return wrong_usage(f"--seed {arguments.seed} is outside 0 .. 2^32 - 1")
    # Two devices, for what the step does across them; read when jax first looks for devices.
    flag = "--xla_force_host_platform_device_count"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}=2".strip()

    if arguments.device is not None:
        platforms = dict.fromkeys((arguments.device, "cpu"))
        os.environ["JAX_PLATFORMS"] = ",".join(platforms)  # read when jax first looks for devices, too

    try:
        from mae_jax.errors import StatedError
        from mae_jax.port.receivers.receiver import NotInstalledError
        from parity.bounds import ACCELERATORS
        from parity.stages import EITHER_PRECISION, STAGES
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        print("The comparison needs PyTorch: pip install 'mae-jax[torch]'", file=sys.stderr)
        return 1

    named = [name for name in ("model", "run", "preset") if getattr(arguments, name) is not None]
    if len(named) > 1 or (arguments.peer and {"run", "preset"} & set(named)):
        return wrong_usage(f"--{' and --'.join(named + ['peer'] * bool(arguments.peer))}: give one of them")
    for name in ("data", "encoder_heads"):
        if (value := getattr(arguments, name)) is not None and arguments.run is None:
            return wrong_usage(f"--{name.replace('_', '-')} {value} is for --run")
    if arguments.peer is not None:
        if arguments.stages:
            return wrong_usage("--stages are the reference's; --peer compares the whole model")
        from parity.peers import declare_torchvision_operators

        declare_torchvision_operators()

    unknown = [name for name in arguments.stages if name not in STAGES]
    if unknown:
        return wrong_usage(f"--stages {' '.join(unknown)}: unknown (there are: {', '.join(STAGES)})")

    platform = find_platform(arguments.device)
    if platform is None:
        return 1
    small = arguments.model not in PUBLISHED and not {"run", "preset"} & set(named)
    prepare_process(small)
    precisions: tuple[Precision, ...] = ("float64", "float32") if arguments.dtype == "both" else (arguments.dtype,)
    if platform == "tpu" and "float64" in precisions:
        print("a TPU has no float64: the comparison is in float32 alone", flush=True)
        precisions = ("float32",)
    if platform != "cpu" and not ACCELERATORS.get(platform):
        print(f"no bounds are measured for float32 on a {platform} yet: those of a CPU are tried", flush=True)
    # What does not depend on the precision is compared once.
    chosen = arguments.stages or tuple(STAGES)
    rest = arguments.stages or tuple(name for name in STAGES if name not in EITHER_PRECISION)
    reports: list[Report] = []
    try:
        if len(precisions) == 2 and platform == "cpu" and small and not arguments.stop_at_first:
            # Most of the time goes into tracing, which one process does on one core.
            with ProcessPoolExecutor(1, get_context("spawn")) as other:
                second = other.submit(compare_apart, arguments, precisions[1], rest)
                reports.append(compare(arguments, precisions[0], chosen))
                report, text = second.result()
                print(text, end="", flush=True)
                reports.append(report)
        else:
            for number, precision in enumerate(precisions):
                reports.append(compare(arguments, precision, rest if number else chosen))
                if arguments.stop_at_first and not reports[-1].passed:
                    break
    except StatedError as error:
        print(f"parity: {error}", file=sys.stderr)
        return 1
    except NotInstalledError as error:
        print(f"--peer {arguments.peer}: {error} cannot be imported; install it", file=sys.stderr)
        return 1
    if arguments.report is not None:
        from parity.report import write

        write(reports, arguments.report)
    return 0 if all(report.passed for report in reports) else 1
