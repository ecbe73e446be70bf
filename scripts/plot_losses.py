"""Draw the losses of a run: python scripts/plot_losses.py RUN OUT.png"""

import sys
from pathlib import Path

import matplotlib

from mae_jax.runs.metrics import read_metrics


def main(run: str, out: str) -> None:
    """Draw the loss by step, from the run's metrics.jsonl."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in read_metrics(Path(run)) if "loss" in row]
    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows])
    axes.set(xlabel="step", ylabel="loss of a batch", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
