"""`python -m parity`: compare mae_jax with the PyTorch reference, stage by stage."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from parity.models import MODELS

if TYPE_CHECKING:
    from parity.bounds import Precision
    from parity.report import Report


@dataclass(frozen=True)
class Arguments:
    """Compare mae_jax with a PyTorch reference from bytes to a trained model, in the order data flows."""

    model: Literal[tuple(MODELS)] | None = None  # type: ignore[valid-type]
    """What to compare: tiny by default, tiny_square with a peer. The published sizes take minutes on a CPU."""
    dtype: Literal["float32", "float64", "both"] = "both"
    peer: Literal["huggingface", "timm", "lightly", "lightly-deprecated"] | None = None
    """Compare with this library's own model in place of the reference: forward pass, loss, gradients."""
    stages: tuple[str, ...] = ()
    """Only these (images, patchify, masks, encoder_blocks, gradients ...); all by default."""
    seed: int = 0
    """Of the weights, images and noise."""
    batch_size: int | None = None
    """Images, an even number: half on each of two devices. 4 for the small models, 2 for the others by default."""
    report: Path | None = None
    """Write parity.json, parity.md and parity.png into this folder."""


def compare(arguments: Arguments, precision: "Precision") -> "Report":
    """Run the stages at one precision, printing a row as each is done."""
    import flax
    import jax
    import torch

    from parity.models import SMALL, SQUARE, TARGETS
    from parity.peers import run as run_peer
    from parity.report import COLUMNS, Report, line, rows
    from parity.sides import Reference
    from parity.stages import run

    model = arguments.model or ("tiny" if arguments.peer is None else "tiny_square")
    batch_size = arguments.batch_size or (4 if model in SMALL | TARGETS | SQUARE else 2)
    reference = Reference(MODELS[model], precision, arguments.seed, batch_size)
    versions = {"jax": jax.__version__, "flax": flax.__version__, "torch": torch.__version__}
    device = jax.local_devices()[0].device_kind
    name = model if arguments.peer is None else f"{model} against {arguments.peer}"
    report = Report(name, precision, arguments.seed, reference.config, versions, device)

    print(f"{name}, {precision}\n{line(COLUMNS)}", flush=True)
    for results in run(reference, arguments.stages) if arguments.peer is None else run_peer(arguments.peer, reference):
        report.results += results
        for row in rows(results):
            print(line(row), flush=True)
    print(report.verdict() + "\n", flush=True)
    return report


def wrong_usage(message: str) -> int:
    """Print what is wrong, and return the exit code for it."""
    print(message, file=sys.stderr)
    return 2


def main() -> int:
    """Return 0 where everything agrees, 1 where something departs, 2 on wrong usage."""
    if sys.argv[1:2] == ["trace"]:
        from parity.tracing import TraceArguments, trace_command

        return trace_command(tyro.cli(TraceArguments, prog="python -m parity trace", args=sys.argv[2:]))
    arguments = tyro.cli(Arguments, prog="python -m parity")
    if arguments.batch_size is not None and (arguments.batch_size < 2 or arguments.batch_size % 2):
        return wrong_usage(f"--batch-size {arguments.batch_size} is not a positive even number")
    if not 0 <= arguments.seed < 2**32:
        return wrong_usage(f"--seed {arguments.seed} is outside 0 .. 2^32 - 1")
    # Two devices, for what the step does across them; read when jax first looks for devices.
    flag = "--xla_force_host_platform_device_count"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}=2".strip()

    try:
        from mae_jax.port.receivers.receiver import NotInstalledError
        from parity.stages import STAGES
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        print("The comparison needs PyTorch: pip install 'mae-jax[torch]'", file=sys.stderr)
        return 1

    if arguments.peer is not None:
        if arguments.stages:
            return wrong_usage("--stages are the reference's; --peer compares the whole model")
        from parity.peers import declare_torchvision_operators

        declare_torchvision_operators()

    unknown = [name for name in arguments.stages if name not in STAGES]
    if unknown:
        return wrong_usage(f"--stages {' '.join(unknown)}: unknown (there are: {', '.join(STAGES)})")

    precisions: tuple[Precision, ...] = ("float64", "float32") if arguments.dtype == "both" else (arguments.dtype,)
    try:
        reports = [compare(arguments, precision) for precision in precisions]
    except NotInstalledError as error:
        print(f"--peer {arguments.peer}: {error} cannot be imported; install it", file=sys.stderr)
        return 1
    if arguments.report is not None:
        from parity.report import write

        write(reports, arguments.report)
    return 0 if all(report.passed for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
