"""Times as figures, and figures as rows of a table: speed, FLOP/s, memory; and why a row has none."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from mae_jax.config import PretrainConfig
from mae_jax.models.flops import training_flops

Figures = dict[str, Any]


class MatrixRate(NamedTuple):
    """What the device multiplies at its best.

    flops: floating-point operations a second, two for each multiply-add.
    size: side of the square matrices that were multiplied.
    """

    flops: float
    size: int
    dtype: str


def figures(
    config: PretrainConfig, seconds: Sequence[float], peak_bytes: int, compile_seconds: float, rate: MatrixRate
) -> Figures:
    """Return a side's figures from the seconds of its timed steps.

    FLOP count the model's definition (mae_jax/models/flops.py), forward and backward as three times forward.
    """
    median, batch = statistics.median(seconds), config.batch_size
    flops = training_flops(config.model) * batch / median
    return {
        "batch": batch,
        "dtype": config.model.dtype,
        "mask_tokens": config.model.encoder_mask_tokens,
        "timed_steps": len(seconds),
        "images_per_second": batch / median,
        "milliseconds": median * 1e3,
        "tflops_per_second": flops / 1e12,
        "matrix_tflops_per_second": rate.flops / 1e12,
        "share_of_matrix_rate": flops / rate.flops,
        "peak_mib": peak_bytes / 2**20,
        "compile_seconds": compile_seconds,
    }


# He et al. 2021, Table 2: times as fast without mask tokens in the encoder as with, decoder of 8 blocks.
PAPER_FACTORS = {"vit_large_patch16": 2.8, "vit_huge_patch14": 3.5}

HEAD = (
    f"{'side':14}{'batch':>6}{'images/s':>10}{'ms':>10}{'TFLOP/s':>9}{'of':>9}{'share':>7}{'peak MiB':>10}"
    f"{'compile s':>10}{'jax : it':>9}  version"
)


def line(row: Figures) -> str:
    """Format a row under HEAD."""
    if "failed" in row:
        return f"{row['side']:14}{row['batch']:6}  {row['failed']}"
    ratio = row.get("ratio_first_over_this")
    return (
        "{side:14}{batch:6}{images_per_second:10.2f}{milliseconds:10.1f}{tflops_per_second:9.3f}"
        "{matrix_tflops_per_second:9.4g}{share_of_matrix_rate:7.1%}{peak_mib:10.0f}{compile_seconds:10.1f}".format(
            **row
        )
        + (" " * 9 if ratio is None else f"{ratio:9.3f}")
        + f"  {row['version']}"
    )


def caption(row: Figures) -> str:
    """Name the model and the device of a table, and what its shares are of."""
    size = row["matrix_size"]
    return (
        f"{row['model']} on {row['device']}; share: of the TFLOP/s beside it, which a product of two {size} x {size} "
        f"matrices in {row['dtype']} reached in this run"
    )


def factor_line(model: str, with_tokens: Figures, without: Figures) -> str:
    """Compare a side's speed with and without mask tokens in the encoder."""
    factor = with_tokens["milliseconds"] / without["milliseconds"]
    paper = f" (the paper: {PAPER_FACTORS[model]})" if model in PAPER_FACTORS else ""
    return f"{without['side']}: without mask tokens in the encoder {factor:.2f} times as fast as with{paper}"


def warning_of_order(rows: Sequence[Figures]) -> str | None:
    """Return the sentence that belongs above a table whose sides did not take turns; None where they did."""
    good = [row for row in rows if "failed" not in row]
    if len({row["side"] for row in good}) > 1 and not all(row["in_turn"] for row in good):
        return "too little memory for all sides at once: timed one after the other"
    return None


NOTICE = "For simplicity, JAX has removed its internal frames"  # which follows the error, between lines of dashes
KILLED = "killed"  # by the system, as a rule, that has no memory left
NO_MEMORY = (
    "out of memory",
    "resource_exhausted",
    "memoryerror",
    "bad_alloc",
    "can't allocate memory",
    "alloc_failed",  # of cuBLAS and cuDNN
    "dnn library initialization failed",  # JAX's words where nothing is left for cuDNN
    KILLED,
)


def reason(errors: str, code: int) -> str:
    """Find the line of a process's errors that names why it ended; 200 characters at most."""
    lines = [text for line in errors.splitlines() if (text := line.strip().strip("-")) and not text.startswith(NOTICE)]
    of_memory = [text for text in lines if lacks_memory(text)]
    killed = [f"{KILLED} (exit code {code})"] if code in (-9, 137) else []
    return (of_memory or killed or lines or [f"exit code {code}"])[-1][:200]


def lacks_memory(why: str) -> bool:
    """Decide whether a `reason` is that memory is lacking."""
    return any(text in why.lower() for text in NO_MEMORY)
