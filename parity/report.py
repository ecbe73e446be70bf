"""What a comparison found: rows on the terminal, and JSON, Markdown and a plot in a folder."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax
import jax
import torch

from mae_jax.port.compare import Comparison, worst
from mae_jax.port.keys import Config
from parity.bounds import BOUNDS, Precision

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ("stage", "tensors", "max abs", "max rel", "bound", "verdict")


@dataclass
class Report:
    """The results of one model, or several, at one precision, in the order data flows."""

    model: str
    precision: Precision
    seed: int
    configs: dict[str, Config]
    versions: dict[str, str]
    device: str
    results: list[Comparison] = field(default_factory=list)

    @classmethod
    def begin(cls, model: str, precision: Precision, seed: int, configs: dict[str, Config]) -> "Report":
        """Make a report without results, of the libraries and the device that are here."""
        versions = {"jax": jax.__version__, "flax": flax.__version__, "torch": torch.__version__}
        return cls(model, precision, seed, configs, versions, jax.local_devices()[0].device_kind)

    def __str__(self) -> str:
        return "\n".join([line(COLUMNS), *map(line, self.rows()), self.verdict()])

    @property
    def departure(self) -> Comparison | None:
        """Return the first result that is not within its bound."""
        return next((result for result in self.results if not result.passed), None)

    @property
    def passed(self) -> bool:
        return bool(self.results) and self.departure is None

    def rows(self) -> Iterator[tuple[str, ...]]:
        return rows(self.results)

    def largest(self) -> dict[str, float]:
        """Return the largest relative error of each kind of bound that was compared."""
        found: dict[str, float] = {}
        for result in self.results:
            found[result.kind] = max(found.get(result.kind, 0.0), result.max_rel)
        return found

    def verdict(self) -> str:
        """State in one or two sentences how it ended."""
        what = f"{self.model}, {self.precision}, seed {self.seed}"
        first = self.departure
        if first is None:
            return (
                f"{what}: all {len(self.results)} tensors agree." if self.results else f"{what}: nothing was compared."
            )
        reason = first.fault or f"{first.max_rel:.1e} is beyond {first.bound:.0e}"
        failed = sum(not result.passed for result in self.results)
        return (
            f"{what}: {failed} of {len(self.results)} tensors differ. "
            f"The first stage that departs is {first.stage!r}, tensor {first.tensor!r}: {reason}."
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "precision": self.precision,
            "seed": self.seed,
            "passed": self.passed,
            "first_departure": self.departure.as_dict() if self.departure else None,
            "device": self.device,
            "versions": self.versions,
            "configs": {name: asdict(config) for name, config in self.configs.items()},
            "results": [result.as_dict() for result in self.results],
        }


def rows(results: list[Comparison]) -> Iterator[tuple[str, ...]]:
    """Yield one row a stage: its worst tensor against that tensor's bound."""
    for stage, group in groupby(results, key=lambda result: result.stage):
        members = list(group)
        last = worst(members)
        bound = f"{last.bound:.1e}" if last.bound else "exact"
        verdict = "ok" if last.passed else f"DEPARTS: {last.tensor}" + (f", {last.fault}" if last.fault else "")
        yield stage, str(len(members)), f"{last.max_abs:.1e}", f"{last.max_rel:.1e}", bound, verdict


def line(row: tuple[str, ...]) -> str:
    """Format a row for the terminal."""
    stage, tensors, *numbers, verdict = row
    return f"{stage:32}{tensors:>8}" + "".join(f"{number:>11}" for number in numbers) + f"   {verdict}"


def write(reports: list[Report], folder: Path) -> None:
    """Write parity.json, parity.md and parity.png into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "parity.json").write_text(json.dumps([report.as_dict() for report in reports], indent=1) + "\n")
    (folder / "parity.md").write_text("\n".join(_markdown(reports)) + "\n")
    _plot(reports, folder / "parity.png")


def _markdown(reports: list[Report]) -> Iterator[str]:
    yield "# mae_jax against PyTorch"
    for report in reports:
        versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
        yield f"\n## {report.model}, {report.precision}\n\n{report.verdict()} ({versions}; {report.device})\n"
        yield "| " + " | ".join(COLUMNS) + " |"
        yield "|---|" + "---:|" * (len(COLUMNS) - 2) + "---|"
        yield from ("| " + " | ".join(row) + " |" for row in report.rows())
    yield "\n## Bounds, the largest errors seen without a mistake, and those of this comparison\n"
    found = [(report.precision, report.largest()) for report in reports]
    head = ["bound", *(f"{precision}{what}" for precision, _ in found for what in ("", ", seen", ", here")), "reason"]
    yield "| " + " | ".join(head) + " |"
    yield "|---|" + "---:|" * (len(head) - 2) + "---|"
    for name, bound in BOUNDS.items():
        numbers = [
            f"{number:.1e}"
            for precision, largest in found
            for number in (bound.at(precision), bound.seen(precision), largest.get(name, nan))
        ]
        yield f"| {name} | " + " | ".join(numbers).replace("nan", "") + f" | {bound.reason} |"


# What one layer gave, in the rows of a comparison.
LAYER_CURVES = {
    "same input": ("tab:blue", lambda result: result.tensor.endswith("same input")),
    "whole pass": ("tab:orange", lambda result: result.tensor.endswith("whole pass")),
    "gradient": ("tab:green", lambda result: result.stage.startswith("gradient ")),
}


def _plot(reports: list[Report], path: Path) -> None:
    """Draw each stage's largest relative error beside its bound, and below how errors grow from layer to layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  (only where a report is asked for)
    from matplotlib.figure import Figure  # noqa: PLC0415

    height = 0.17 * max(len(list(report.rows())) for report in reports)
    figure = Figure(figsize=(6 * len(reports), 5.5 + height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(reports), squeeze=False, height_ratios=(1.5 + height, 3))
    for report, above, below in zip(reports, *axes, strict=True):
        _draw_stages(report, above)
        _draw_layers(report, below)
    figure.savefig(path, dpi=130)


def _draw_stages(report: Report, axes: "Axes") -> None:
    """Draw stages from top to bottom on a logarithmic scale; where there is no error its mark lies at the foot."""
    foot = 1e-18
    found = [worst(list(group)) for _, group in groupby(report.results, key=lambda result: result.stage)]
    places = range(len(found))
    axes.scatter([max(r.bound, foot) for r in found], places, marker="|", color="black", label="bound")
    for passed, colour in ((True, "tab:blue"), (False, "tab:red")):
        shown = [i for i in places if found[i].passed == passed and found[i].max_rel == found[i].max_rel]
        label = "max rel" if passed else "departs"
        axes.scatter([max(found[i].max_rel, foot) for i in shown], shown, s=14, color=colour, label=label)
    names = report.model if len(report.model) < 40 else f"{len(report.configs)} models"
    axes.set(xscale="log", title=f"{names}, {report.precision}", xlabel="relative error", xlim=(foot / 3, 10))
    axes.set_yticks(places, [result.stage for result in found], fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7)


def _draw_layers(report: Report, axes: "Axes") -> None:
    """Draw the error of each layer's result and of its gradients, in the order the data passes them."""
    layers = sorted(
        {layer for result in report.results if (layer := _layer(result))}, key=lambda x: (x[0][0] != "e", x)
    )
    for label, (colour, belongs) in LAYER_CURVES.items():
        errors = {layer: [r.max_rel for r in report.results if _layer(r) == layer and belongs(r)] for layer in layers}
        drawn = [(place, max(errors[layer])) for place, layer in enumerate(layers) if errors[layer]]
        axes.plot(*zip(*drawn, strict=True) if drawn else ([], []), marker=".", color=colour, label=label)
    axes.set_xticks(range(len(layers)), [f"{stack[:3]} {number}" for stack, number in layers], fontsize=6, rotation=90)
    axes.set(yscale="log", title="by block", ylabel="relative error")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=7)


def _layer(result: Comparison) -> tuple[str, int] | None:
    """Return the stack and number of the block that a result is of, if it is of one."""
    match = re.fullmatch(r"(?:gradient )?(encoder block |decoder block |blocks\.|decoder_blocks\.)(\d+)", result.stage)
    return ("decoder" if match[1].startswith("decoder") else "encoder", int(match[2])) if match else None
