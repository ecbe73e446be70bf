"""Break a short run in every way that a machine knows, start it again, and see that nothing is lost.

    python scripts/fault_drill.py                       # 50 faults
    python scripts/fault_drill.py --count 12 --seed 3   # one of each kind

A trial is a run of the bundled digits in a folder of its own, one fault at a random step, and the same command again to
the end. It has survived if its final state equals, bit for bit, that of a run never stopped, if every step stands once
in metrics.jsonl with that run's numbers, and if the fault was met as it should be: with the right exit code, and where
the program could speak, a sentence, after which it is gone at once. Faults of disks happen on disks of their own, which
are mounted where that is allowed; else they are skipped. Exits with 1 if a trial has not survived.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

STEPS, SAVE_EVERY = 120, 10
COMMAND = [
    *(sys.executable, "-m", "mae_jax.cli", "pretrain", "digits"),
    *("--model.encoder.width=32", "--model.encoder.depth=2"),
    *("--model.decoder.width=16", "--model.decoder.depth=1", "--model.decoder.heads=2"),
    *("--batch-size=32", "--log-every=1", "--reconstruct-every=None", "--devices=1"),
    *("--optim.base-lr=0.02", "--optim.warmup-epochs=0.05", "--optim.ema-decay=0.9"),
    *(f"--steps={STEPS}", f"--save-every={SAVE_EVERY}"),
]
# Runs the command after it without root's right to write where it may not (CAP_DAC_OVERRIDE, prctl(2)).
OBEY_PERMISSIONS = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"
)
PATIENCE = 300  # seconds for a run to get where it should, or to end


@dataclass(frozen=True)
class Arguments:
    """Faults at random steps of a short run: survived / tried."""

    count: int = 50
    seed: int = 0
    minutes: float = 60.0
    """No new trial after this time."""


@dataclass
class Trial:
    """One run and what happens to it."""

    workdir: Path
    step: int
    process: subprocess.Popen[str] | None = None

    def start(self, *prefix: str) -> None:
        """Start the run, or go on with it."""
        command = [*prefix, *COMMAND, f"--workdir={self.workdir}"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def at_step(self) -> None:
        """Wait until the run has logged its step."""
        metrics = self.workdir / "metrics.jsonl"
        self.wait_for(lambda: metrics.exists() and f'"step": {self.step},' in metrics.read_text())

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait for a condition, while the run goes on.

        Raises:
          Missed: the run was over before.
          TimeoutError: it took too long.
        """
        assert self.process is not None
        until = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None:
                raise Missed
            if time.monotonic() > until:
                raise TimeoutError(f"step {self.step} did not come within {PATIENCE} s")
            time.sleep(0.0005)

    def end(self, code: int, words: str = "", clean: bool = True) -> None:
        """Wait for the end of the run, which must be as expected.

        clean: no traceback is to be seen. Of a disk that fails in the middle of a save, TensorStore prints one for each
        array that it writes just then.

        Raises:
          Missed: the run ended as if nothing had happened.
          AssertionError: it ended in another way.
        """
        assert self.process is not None
        watchdog = threading.Timer(PATIENCE, self.process.kill)
        watchdog.start()
        err, failed = "", None
        for line in self.process.stderr:
            err += line
            failed = time.monotonic() if line.startswith("mae-jax: ") else failed
        out = self.process.stdout.read()
        found = self.process.wait()
        watchdog.cancel()
        if found == 0 != code:
            raise Missed
        if found != code or words not in out + err or (clean and "Traceback" in err):
            raise AssertionError(f"exit code {found} for {code}, and printed: {(out + err)[-2000:]}")
        if failed is not None and time.monotonic() - failed > 10:
            raise AssertionError(f"{time.monotonic() - failed:.1f} s went by between its last words and its end")


class Missed(Exception):
    """The run was over before the fault could happen: no trial."""


class Skipped(Exception):
    """The fault cannot be made on this machine, for the reason given."""


def terminated(trial: Trial) -> None:
    """Send SIGTERM."""
    trial.start()
    trial.at_step()
    trial.process.terminate()
    trial.end(143, "stopped by SIGTERM; to continue: ")


def killed(trial: Trial) -> None:
    """Send SIGKILL."""
    trial.start()
    trial.at_step()
    trial.process.kill()
    trial.end(-signal.SIGKILL)


def killed_in_a_save(trial: Trial) -> None:
    """Send SIGKILL while a checkpoint is being written."""
    trial.start()
    trial.at_step()
    folder = trial.workdir / "checkpoints"
    trial.wait_for(lambda: any("tmp" in name for name in os.listdir(folder)))
    trial.process.kill()
    trial.end(-signal.SIGKILL)
    if not any("tmp" in name for name in os.listdir(folder)):
        raise Missed


def cut_short(trial: Trial) -> None:
    """Send SIGKILL, and cut off the second half of the largest file of the newest checkpoint."""
    trial.start()
    trial.at_step()
    trial.process.kill()
    trial.end(-signal.SIGKILL)
    newest = max((p for p in (trial.workdir / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)


def power_cut(trial: Trial) -> None:
    """Send SIGKILL, empty the files of the newest checkpoint, and end the rows in zeros, as a power cut may."""
    trial.start()
    trial.at_step()
    trial.process.kill()
    trial.end(-signal.SIGKILL)
    newest = max((p for p in (trial.workdir / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    for file in newest.rglob("*"):
        if file.is_file():
            os.truncate(file, 0)
    with (trial.workdir / "metrics.jsonl").open("ab") as rows:
        rows.write(bytes(100))


def second_process(trial: Trial) -> None:
    """Start a second process in the same folder: refused, also where the first is stopped; that goes on to its end."""
    trial.start()
    trial.at_step()
    trial.process.send_signal(signal.SIGSTOP)
    other = Trial(trial.workdir, trial.step)
    other.start()
    other.end(1, f"is in use by process {trial.process.pid} on ")
    trial.process.send_signal(signal.SIGCONT)
    trial.end(0)


def full_disk(trial: Trial) -> None:
    """Leave no space for a while: where no disk may be mounted, no file of the run may grow."""
    try:
        with disk(trial.workdir, "tmpfs", "size=64m"):
            trial.start()
            trial.at_step()
            with full(trial.workdir):
                trial.end(1, "cannot be written", clean=False)
    except Skipped:
        trial.start()
        trial.at_step()
        hard = resource.prlimit(trial.process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(trial.process.pid, resource.RLIMIT_FSIZE, (0, hard))
        trial.end(1, "cannot be written", clean=False)


def full_ext4(trial: Trial) -> None:
    """Leave no space for a while on ext4."""
    with disk(trial.workdir, "ext4"):
        trial.start()
        trial.at_step()
        with full(trial.workdir):
            trial.end(1, "cannot be written", clean=False)


def full_in_a_save(trial: Trial) -> None:
    """Leave no space while a checkpoint is being written."""
    with disk(trial.workdir, "tmpfs", "size=64m"):
        trial.start()
        trial.at_step()
        folder = trial.workdir / "checkpoints"
        filler = trial.workdir / "filler"
        filler.write_bytes(bytes(8 * 2**20))
        trial.wait_for(lambda: any("tmp" in name for name in os.listdir(folder)))
        with full(trial.workdir):
            trial.end(1, "cannot be written", clean=False)
        filler.unlink()


def no_inodes(trial: Trial) -> None:
    """Leave no inodes for a while, so that no file can be made."""
    with disk(trial.workdir, "ext4"):
        trial.start()
        trial.at_step()
        crowd = trial.workdir / "crowd"
        crowd.mkdir()
        with contextlib.suppress(OSError):
            for number in range(10**6):
                (crowd / str(number)).touch()
        trial.end(1, "cannot be written", clean=False)
        shutil.rmtree(crowd)


def mounted_read_only(trial: Trial) -> None:
    """Mount the disk read-only under the run, as the kernel does with one that fails."""
    with disk(trial.workdir, "ext4"):
        trial.start()
        trial.at_step()
        # Busy while files are open for writing, unless forced: as for an error.
        mount = ["mount", "-o", "remount,ro", str(trial.workdir)]
        abort = ["mount", "-o", "remount,abort", str(trial.workdir)]
        if subprocess.run(mount, capture_output=True).returncode:
            subprocess.run(abort, check=True, capture_output=True)
        trial.end(1, "cannot be written", clean=False)


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """Fill the disk under a folder until the `with` ends."""
    filler = folder / "fills-the-disk"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(2**16)):
            pass
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while file.write(b"0"):
            pass
    yield
    filler.unlink()


@contextlib.contextmanager
def disk(workdir: Path, kind: str, *options: str) -> Iterator[None]:
    """Mount a disk of 64 MB for the run's folder, whose content is kept.

    Raises:
      Skipped: mounting is not allowed here.
    """
    workdir.mkdir()
    image, kept = Path(f"{workdir}.image"), Path(f"{workdir}.kept")
    device = "none"
    if kind == "ext4":
        with image.open("wb") as file:
            file.truncate(64 * 2**20)
        if shutil.which("mkfs.ext4") is None:
            raise Skipped("there is no mkfs.ext4")
        subprocess.run(["mkfs.ext4", "-q", "-F", "-N", "512", str(image)], check=True)
        device, options = str(image), (*options, "loop")
    command = ["mount", "-t", kind, "-o", ",".join(options), device, str(workdir)]
    if subprocess.run(command, capture_output=True).returncode:
        workdir.rmdir()
        raise Skipped(f"no {kind} may be mounted")
    try:
        yield
        shutil.copytree(workdir, kept, ignore=shutil.ignore_patterns("lost+found"))
    finally:
        subprocess.run(["umount", "--lazy", str(workdir)], check=True)
        image.unlink(missing_ok=True)
        if kept.exists():
            workdir.rmdir()
            kept.rename(workdir)


def read_only(trial: Trial) -> None:
    """Take away the permission to write into the folder, for a while."""
    trial.start(sys.executable, "-c", OBEY_PERMISSIONS)
    trial.at_step()
    folders = [trial.workdir, *(path for path in trial.workdir.rglob("*") if path.is_dir())]
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):  # what was still being written
            folder.chmod(0o555)
    trial.end(1, "cannot be written", clean=False)
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            folder.chmod(0o755)


FAULTS = [
    *(terminated, killed, killed_in_a_save, cut_short, power_cut, second_process, full_disk, full_ext4),
    *(full_in_a_save, no_inodes, mounted_read_only, read_only),
]


def outcome(workdir: Path) -> tuple[dict[int, tuple[float, float]], dict[str, int], list[bytes]]:
    """Read loss and gradient norm by step, the fingerprint of each array of the final state, the final parameters.

    Raises:
      AssertionError: a step stands twice, or is missing.
    """
    import jax
    import numpy as np

    from mae_jax.storage.loading import load_params
    from mae_jax.storage.workdir import find_checkpoint, read_record

    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    if [row["step"] for row in rows] != list(range(1, STEPS + 1)):
        raise AssertionError(f"metrics.jsonl does not hold steps 1 to {STEPS}, each once and in order")
    _, params, step = load_params(workdir)
    if step != STEPS:
        raise AssertionError(f"the last checkpoint is of step {step}, not {STEPS}")
    numbers = {row["step"]: (row["loss"], row["grad_norm"]) for row in rows}
    arrays = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]
    return numbers, read_record(find_checkpoint(workdir)).fingerprint, arrays


def survive(trial: Trial, fault: Callable[[Trial], None], expected: tuple) -> None:
    """Let a fault happen to a run, start the run again, and compare it with one that was never stopped.

    Raises:
      Missed: the fault came too late.
      AssertionError: something was lost.
    """
    fault(trial)
    trial.start()
    trial.end(0)
    for what, found, wanted in zip(("metrics", "state", "parameters"), outcome(trial.workdir), expected, strict=True):
        if found != wanted:
            raise AssertionError(f"the {what} are not those of a run never stopped")


def main() -> int:
    """Print a line for each trial, then survived / tried."""
    arguments = tyro.cli(Arguments)
    began, draw, survived, tried = time.monotonic(), random.Random(arguments.seed), 0, 0
    faults = list(FAULTS)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{scratch}/compiled"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        whole = Trial(Path(scratch, "whole"), STEPS)
        whole.start()
        whole.end(0)
        expected = outcome(whole.workdir)
        while tried < arguments.count and time.monotonic() - began < 60 * arguments.minutes:
            fault = faults[tried % len(faults)]
            # From where there are two checkpoints, so that there is one to go back to.
            trial = Trial(Path(scratch, f"{tried}"), draw.randint(3 * SAVE_EVERY, STEPS - SAVE_EVERY))
            try:
                survive(trial, fault, expected)
                result = "survived"
                survived += 1
            except Missed:
                result = "came too late, once more"
                tried -= 1
            except Skipped as reason:
                result = f"skipped: {reason}"
                faults.remove(fault)
                tried -= 1
            except (AssertionError, TimeoutError, subprocess.TimeoutExpired) as error:
                result = f"LOST: {error}"
            finally:
                if trial.process is not None and trial.process.poll() is None:
                    trial.process.kill()
            tried += 1
            print(f"{tried:3} {fault.__name__:17} at step {trial.step:3}: {result}", flush=True)
            shutil.rmtree(trial.workdir, ignore_errors=True)
    print(f"survived {survived} / tried {tried}")
    return int(survived < tried)


if __name__ == "__main__":
    sys.exit(main())
