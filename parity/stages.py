"""All stages in the order data flows, from files to a trained model and what is made of it; and how they are run."""

from collections.abc import Iterator, Sequence

import jax

from mae_jax.port.compare import Comparison
from parity.bounds import compare
from parity.forward import FORWARD
from parity.input_stages import INPUTS
from parity.sides import Ours, Reference
from parity.training import TRAINING
from parity.transfer import TRANSFER

STAGES = {stage.__name__: stage for stage in (*INPUTS, *FORWARD, *TRAINING, *TRANSFER)}


def run(reference: Reference, stages: Sequence[str] = ()) -> Iterator[list[Comparison]]:
    """Run these stages, or all, and yield the results of one after another.

    Each precision runs as its users run it: float64 with 64-bit values enabled, float32 without.
    """
    ours = None
    for name, stage in STAGES.items():
        if stages and name not in stages:
            continue
        with jax.enable_x64(reference.precision == "float64"), jax.default_matmul_precision("highest"):
            ours = ours or Ours(reference)
            results = [compare(pair, reference.precision) for pair in stage(ours, reference)]
        yield results
