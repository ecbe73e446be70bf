"""Make the whole GPU table: this project beside PyTorch, batches, mask tokens, memory, compilation, profiles.

    python scripts/bench_gpu.py --out gpu_table --minutes 5      # again, until nothing is left

Every job is a process of its own whose rows go into OUT/rows.jsonl as it ends; a job that is there already is skipped,
so a run that was cut off goes on; --retry runs those again that failed. OUT/report.md is written anew after each; a job
not yet run is not in it. Where commands are cut after some minutes, --job-minutes below that keeps one from being begun
again for ever.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ended import ended

from mae_jax.bench.recipe import bench_config
from mae_jax.bench.table import HEAD, caption, factor_line, lacks_memory, line, reason, warning_of_order
from mae_jax.errors import StatedError
from mae_jax.files import hold, write_atomically

SCRIPTS = Path(__file__).resolve().parent
LARGE_MODELS = ("vit_base_patch16", "vit_large_patch16", "vit_huge_patch14")
KEEP = "keep compiled programs"  # among a job's words: it shares a cache with the others that have it
FIRST, SECOND = "Compilation, first start", "Compilation, second start"

# Kernels are launched one by one: the profiler sees a command buffer as one thing.
NO_BUFFERS = "--xla_gpu_enable_command_buffer="
# What XLA is tried with beside what it does by itself, where a kernel's choice or its launch may matter.
FLAGS = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    NO_BUFFERS,
    "--xla_gpu_autotune_level=0",
    "--xla_gpu_enable_triton_gemm=false",
)

Job = tuple[str, list[str]]  # what it shows, and the words of its command


def jobs(models: list[str], batch: int, dtype: str, rounds: int, device: str, attention: str) -> list[Job]:
    """List what is run, the most wanted first: the comparison is worth more than a sweep."""
    common = [f"--dtype={dtype}", f"--device={device}", "--json", f"--rounds={rounds}"]
    kind = [] if attention == "xla" else [f"--attention={attention}"]
    alone = ["--against=", *kind]
    largest = models[-1]

    def step(model: str, *words: str) -> list[str]:
        return ["bench_step.py", f"--model={model}", *common, *words]

    compared = [
        ("Beside PyTorch", step(model, f"--batch={batch}", "--against=torch,torch-compile", *kind)) for model in models
    ]
    # In jobs of their own, since four sides would need more memory than a card has.
    both = [("Attention", step(model, f"--batch={batch}", "--against=jax-cudnn")) for model in models]
    kept = [(title, step(largest, f"--batch={batch}", *alone, KEEP)) for title in (FIRST, SECOND)]
    singly = [NO_BUFFERS] if device == "gpu" else []
    profiles = [
        ("Profile", ["profile_step.py", f"--model={model}", f"--batch={batch}", *common[:2], *kind, *singly])
        for model in models
    ]
    tokens = [
        ("Mask tokens", step(model, f"--batch={batch // 4}", *alone, "--mask-tokens=both")) for model in models[1:]
    ]
    memory = [
        ("Largest batch", step(largest, f"--batch={batch}", *alone, "--largest-batch", *remat))
        for remat in ([], ["--remat"])
    ]
    sizes = [str(size) for size in (batch // 4, batch // 2, batch * 2)]
    sweeps = [("Batches", [*step(model, *alone), "--batch", *sizes]) for model in models]
    middle = models[len(models) // 2]
    tried = [("XLA flags", step(middle, f"--batch={batch}", *alone, *flag)) for flag in ([], *([f] for f in FLAGS))]
    fused = (dtype, device, attention) == ("bfloat16", "gpu", "xla")
    if device == "cpu":  # whose memory is the machine's: the largest batch would take all of it
        memory, tried = [], []
    return compared + (both if fused else []) + kept + profiles + tokens + memory + sweeps + tried


def check_gpu() -> None:
    """Refuse a machine on which JAX finds no GPU, by a process that lets go of it again.

    Raises:
      StatedError: it finds none.
    """
    asked = [sys.executable, "-c", "import jax; jax.devices()"]
    done = subprocess.run(asked, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cuda"})
    if done.returncode:
        why = reason(done.stderr, done.returncode)
        raise StatedError(
            f"JAX finds no GPU here that it can use ({why}): give --device cpu to try the table on the CPU",
            field="device",
        )


def run(number: int, job: Job, out: Path, minutes: float, lock: int) -> dict[str, Any]:
    """Run a job and return its rows, or its text; a row with the reason where it took longer than `minutes`.

    It inherits the lock of the folder: one that outlives a command which is killed outright keeps the next from timing
    anything beside it.
    """
    title, words = job
    cache = str((out / "compiled").resolve())
    keep, flags = KEEP in words, [word for word in words if word in FLAGS]
    command = [sys.executable, str(SCRIPTS / words[0]), *(word for word in words[1:] if word not in (KEEP, *flags))]
    variables = {"JAX_COMPILATION_CACHE_DIR": cache} if keep else {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    if flags:
        variables["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()
    if words[0] == "profile_step.py":
        variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.95"  # bench_step.py sets its own
    if title == FIRST:
        shutil.rmtree(cache, ignore_errors=True)  # what a start that was cut off has left
    began = time.monotonic()
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=os.environ | variables,
            timeout=minutes * 60,
            pass_fds=(lock,),
        )
    except subprocess.TimeoutExpired:
        done = subprocess.CompletedProcess(command, 1, "", f"took longer than {minutes:g} minutes")
    print(f"{title}: {' '.join(words)}: {time.monotonic() - began:.0f} s", flush=True)
    about = {"job": number, "title": title, "words": words}
    if words[0] == "profile_step.py" and done.returncode == 0:
        return about | {"text": done.stdout}
    rows = [row for text in done.stdout.splitlines() if text.startswith("[") for row in json.loads(text)]
    if not rows:
        rows = [{"side": title, "batch": 0, "failed": reason(done.stderr, done.returncode)}]
    return about | {"rows": rows}


def report(found: list[dict[str, Any]]) -> str:
    """Write all that is known as Markdown."""
    parts = ["# The training step\n"]
    for job in found:
        model = next(word.partition("=")[2] for word in job["words"] if word.startswith("--model="))
        words = " ".join(word for word in job["words"] if word not in (KEEP, *FLAGS))
        kept = "JAX_COMPILATION_CACHE_DIR=compiled " if KEEP in job["words"] else ""
        kept += "".join(f"XLA_FLAGS={word} " for word in job["words"] if word in FLAGS)
        parts.append(f"## {job['title']}: {model}\n\n`{kept}python scripts/{words}`\n\n```")
        if "text" in job:
            parts.append(job["text"].rstrip())
        else:
            good = [row for row in job["rows"] if "failed" not in row]
            parts += [caption(row) for row in good[:1]]
            parts += [warning for warning in [warning_of_order(job["rows"])] if warning]
            parts += [HEAD, *map(line, job["rows"])]
            parts += [
                f"batch {row['largest_batch_below']} does not fit" for row in good if "largest_batch_below" in row
            ]
            if len(good) == 2 and good[0]["mask_tokens"] and not good[1]["mask_tokens"]:
                parts.append(factor_line(model, good[0], good[1]))
        parts.append("```\n")
    return "\n".join(parts)


def failed(job: dict[str, Any]) -> bool:
    """Decide whether a row failed of something other than a lack of memory, which a table is to show."""
    return any("failed" in row and not lacks_memory(row["failed"]) for row in job.get("rows", []))


def write_report(out: Path, known: dict[int, dict[str, Any]]) -> None:
    """Write the report of the jobs that are done, in the order of the table."""
    write_atomically(out / "report.md", report([known[number] for number in sorted(known)]))


def recorded(record: Path) -> list[dict[str, Any]]:
    """Read the jobs that are done; a last line that a kill cut short is none.

    Raises:
      StatedError: the file is not what this command has written.
    """
    found = []
    for number, text in enumerate(record.read_bytes().splitlines(keepends=True) if record.exists() else [], 1):
        if text.endswith(b"\n"):
            try:
                job = json.loads(text.decode())
                if not isinstance(job["job"], int):
                    raise TypeError(f"job {job['job']} is no number")
                report([job])
                failed(job)
                found.append(job)
            except Exception as error:  # whatever a report of something else raises
                message = f"{record}, line {number}, is damaged: delete it, or choose another --out"
                raise StatedError(message, field="rows.jsonl") from error
    return found


def main() -> int:
    """Check all that is given, then run what is left; 1 where a job failed."""
    parser = argparse.ArgumentParser(description="The GPU table.")
    parser.add_argument("--out", type=Path, default=Path("gpu_table"))
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no job after so many")
    parser.add_argument("--job-minutes", type=float, default=60, help="a job that takes longer fails")
    parser.add_argument("--retry", action="store_true", help="run jobs again that failed, but for lack of memory")
    parser.add_argument("--models", nargs="+", default=list(LARGE_MODELS), help="the last is the one that must fit")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=10, help="of 3 steps")
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla", help="of this project's side")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    arguments = parser.parse_args()
    if (arguments.attention, arguments.dtype) == ("cudnn", "float32"):
        sys.exit("--attention cudnn needs --dtype bfloat16")
    if (arguments.attention, arguments.device) == ("cudnn", "cpu"):
        sys.exit("--attention cudnn needs an NVIDIA GPU, not --device cpu")
    if len(set(arguments.models)) < len(arguments.models):
        sys.exit(f"--models {' '.join(arguments.models)} would time one twice: name each once")
    if arguments.rounds < 1:
        sys.exit(f"--rounds {arguments.rounds} must be positive")
    if arguments.batch < 4:
        sys.exit(f"--batch {arguments.batch} must be 4 or more: some jobs take a quarter of it")
    if not (arguments.minutes >= 0 and arguments.job_minutes > 0):
        sys.exit(f"--minutes {arguments.minutes:g} and --job-minutes {arguments.job_minutes:g} must be positive")
    for model in arguments.models:
        bench_config(model, arguments.batch, arguments.dtype, attention=arguments.attention)
    if arguments.device == "gpu":
        check_gpu()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(arguments.out, error) from error
    with hold(arguments.out, "out") as held:
        return fill(arguments, held.lock)


def fill(arguments: argparse.Namespace, lock: int) -> bool:
    """Run what is left of the table, and return whether a job failed."""
    began, out = time.monotonic(), arguments.out
    record = out / "rows.jsonl"
    try:
        found = [job for job in recorded(record) if not (arguments.retry and failed(job))]
        write_atomically(record, "".join(json.dumps(job) + "\n" for job in found))
        write_report(out, {job["job"]: job for job in found})
    except OSError as error:
        raise unwritable(out, error) from error
    wanted = jobs(
        arguments.models, arguments.batch, arguments.dtype, arguments.rounds, arguments.device, arguments.attention
    )
    known = {job["job"]: job for job in found}
    if any(number not in range(len(wanted)) or known[number]["words"] != wanted[number][1] for number in known):
        sys.exit(f"{record} is of another command: choose another --out")
    for number, job in enumerate(wanted):
        if number in known:
            continue
        if time.monotonic() - began > arguments.minutes * 60:
            break
        known[number] = run(number, job, out, arguments.job_minutes, lock)
        try:
            with record.open("a") as file:
                file.write(json.dumps(known[number]) + "\n")
            write_report(out, known)
        except OSError as error:
            print(report([known[number]]), flush=True)
            raise unwritable(out, error, "the last job's rows are printed. Make room, and run this again") from error
    left = len(wanted) - len(known)
    print(f"{out / 'report.md'}: {len(known)} jobs done" + (f", {left} left: run this again" if left else ""))
    wrong = sum(map(failed, known.values()))
    if wrong:
        print(f"{wrong} failed: run this again with --retry", file=sys.stderr)
    return wrong > 0


def unwritable(out: Path, error: OSError, advice: str = "choose another") -> StatedError:
    """Return the failure of a folder that cannot be written to."""
    return StatedError(f"--out {out} cannot be written ({error.strerror}): {advice}", field="out")


if __name__ == "__main__":
    sys.exit(ended(main))
