"""Record what short runs compute, and compare a later version of the code with it: does a change alter a number?

    python scripts/golden_losses.py --record before.json
    python scripts/golden_losses.py --compare before.json                    # equal to the bit
    python scripts/golden_losses.py --compare before.json --within 1e-12     # relative

20 steps in float64 of pretraining (crops on the host, then on the device), a probe and a fine-tuning on the bundled
digits, by the real command line: each step's loss, the scores, and of each parameter a checksum and its norm. Records
of one machine and one JAX are comparable: other processors and compilers round otherwise.
"""

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ended import ended

from mae_jax.errors import StatedError

COMMON = ["--precision", "float64", "--log-every", "1", "--batch-size", "64"]
PRETRAINED = ["--init", "pretrain"]
REGULARISED = ["--optim.ema-decay=0.9", "--drop-path=0.1", "--mix.mixup=0.8", "--mix.cutmix=1", "--mix.erase=0.25"]
RUNS = {
    "pretrain": ["pretrain", "digits", "--optim.warmup-epochs", "0.2"],
    "device": ["pretrain", "digits", "--crops", "device", "--accumulate", "2", "--model.norm-pix-loss"],
    "probe": ["probe", "digits", *PRETRAINED, "--sweep", "0.05", "0.5"],
    "finetune": ["finetune", "digits", *PRETRAINED, *REGULARISED],
}

Found = dict[str, Any]


def train(names: list[str], steps: int, folder: Path) -> dict[str, Found]:
    """Run the commands, and return what each computed: losses and scores in hexadecimal, and its parameters.

    Raises:
      StatedError: a command fails.
    """
    found = {}
    for name in names:
        print(f"{name}: {steps} steps", flush=True)
        counts = ["--steps", str(steps), "--save-every", str(steps), "--workdir", name]
        command = [sys.executable, "-m", "mae_jax.cli", *RUNS[name], *COMMON, *counts]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise StatedError(f"{name}: {' '.join(command)} ended with {done.returncode}: {done.stderr}", field=name)
        rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        found[name] = {
            part: {f"step {row['step']}": float(row[key]).hex() for row in rows if key in row}
            for part, key in (("losses", "loss"), ("scores", "top1"), ("evaluation losses", "evaluation_loss"))
        }
        found[name]["parameters"] = parameters(folder / name)
    return found


def parameters(run: Path) -> dict[str, list[str]]:
    """Return a checksum and the norm, in hexadecimal, of each parameter of a run's last checkpoint."""
    import jax
    import numpy as np

    from mae_jax.storage.loading import load_any

    jax.config.update("jax_enable_x64", True)
    _, params, _ = load_any(run)
    arrays = {
        jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    return {
        path: [hashlib.sha256(array.tobytes()).hexdigest(), float(np.linalg.norm(array)).hex()]
        for path, array in sorted(arrays.items())
    }


def differences(old: dict[str, Found], new: dict[str, Found], within: float) -> list[str]:
    """List where two records differ by more than `within`, relative; where that is 0, by a bit."""
    lines = []
    for name in old:
        for part, before in old[name].items():
            after = new[name][part]
            if before.keys() != after.keys():
                lines.append(f"{name}: other {part}: {', '.join(sorted(before.keys() ^ after.keys()))}")
            for key in [key for key in before if key in after and before[key] != after[key]]:
                was, now = (
                    float.fromhex(value[1] if part == "parameters" else value) for value in (before[key], after[key])
                )
                if within == 0 or not math.isclose(was, now, rel_tol=within):
                    what = f"norm of {key}" if part == "parameters" else f"{part}, {key}"
                    lines.append(f"{name}: {what}: {was!r}, now {now!r}")
    return lines


def main() -> int:
    """Record, or compare and return 1 where something differs."""
    parser = argparse.ArgumentParser(description="Losses and parameters of short runs, recorded and compared.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", type=Path, help="write them into this file")
    what.add_argument("--compare", type=Path, help="compare with those in this file")
    parser.add_argument("--within", type=float, default=0.0, help="relative difference that passes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="probe and finetune need pretrain")
    arguments = parser.parse_args()
    old: dict[str, Found] = {}
    if arguments.compare:
        old = json.loads(arguments.compare.read_text())
        arguments.runs = list(old)
        arguments.steps = len(next(iter(old.values()))["losses"])
    with tempfile.TemporaryDirectory() as folder:
        new = train(arguments.runs, arguments.steps, Path(folder))
    if arguments.record:
        arguments.record.write_text(json.dumps(new, indent=1) + "\n")
        print(f"wrote {arguments.record}")
        return 0
    found = differences(old, new, arguments.within)
    bound = f"within {arguments.within:g}" if arguments.within else "to the bit"
    print(*found, f"{len(found)} differences" if found else f"equal {bound}", sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(ended(main))
