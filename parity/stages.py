"""All stages in the order data flows, from files to a trained model and what is made of it; and how they are run."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import nan

import jax

from mae_jax.port.compare import Comparison
from parity.bfloat16 import BFLOAT16
from parity.bounds import Pairs, compare
from parity.forward import FORWARD
from parity.initial import INITIAL
from parity.input_stages import INPUTS
from parity.sides import Ours, Reference
from parity.training import EVERY_GRADIENT, TRAINING, operations
from parity.transfer import TRANSFER

PASS = (*FORWARD, operations, *BFLOAT16, *EVERY_GRADIENT)
STAGES = {stage.__name__: stage for stage in (*INPUTS, *PASS, *INITIAL, *TRAINING, *TRANSFER)}

# What depends on the choices of a model; the rest is compared with the first model alone.
EVERY_MODEL = {stage.__name__ for stage in (*FORWARD, *EVERY_GRADIENT)}

# What is drawn, moved and counted, and the parts of bfloat16 models, are the same at either precision of the rest.
EITHER_PRECISION = {
    "order", "decoding", "boxes", "host_crops", "device_crops", "patchify", "position_tables", "noise", "masks",
    "parameter_groups", "layer_decay", "mixed_precision", "mixed_precision_pass",
}  # fmt: skip


def run(references: Sequence[Reference], stages: Sequence[str] = (), stop: bool = False) -> Iterator[list[Comparison]]:
    """Run these stages, or all, one after another, each with every model that it depends on; yield a stage's results.

    Each precision runs as its users run it: float64 with 64-bit values enabled, float32 without.

    stop: after the first stage that departs.
    """
    ours: dict[str, Ours] = {}
    for name in STAGES:
        if stages and name not in stages:
            continue
        results: list[Comparison] = []
        for reference in references if name in EVERY_MODEL else references[:1]:
            prefix = f"{reference.name}: " if len(references) > 1 else ""
            with jax.enable_x64(reference.precision == "float64"), jax.default_matmul_precision("highest"):
                results += _results(name, ours, reference, prefix)
        # The rows of a stage stand together, whichever model they are of.
        order = list(dict.fromkeys(result.stage for result in results))
        results.sort(key=lambda result: order.index(result.stage))
        yield results
        if stop and not all(result.passed for result in results):
            return


def _results(name: str, ours: dict[str, Ours], reference: Reference, prefix: str) -> Iterator[Comparison]:
    """Compare each pair of a stage; an error within is a result of the stage, and the last."""
    try:
        if reference.name not in ours:
            ours[reference.name] = Ours(reference)
        pairs: Pairs = STAGES[name](ours[reference.name], reference)
        for pair in pairs:
            result = compare(pair, reference.precision, jax.default_backend())
            yield replace(result, tensor=prefix + result.tensor)
    except Exception as error:  # whatever a mistake makes any layer raise
        words = " ".join(str(error).split())[:200]
        fault = f"stopped by {type(error).__name__}: {words}"
        yield Comparison(f"{prefix}{name}", nan, nan, 0.0, fault, name.replace("_", " "))
