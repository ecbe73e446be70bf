"""A run called from Python: in a thread, in a script without a guard, and without a trace in the calling process."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from .conftest import ROOT

# Takes what a run could change before and after it, and prints what differs.
SCRIPT = """
import dataclasses, gc, json, logging, os, signal, sys, threading, warnings
import cv2, jax
from PIL import Image
import mae_jax
from mae_jax.presets.pretraining import PRESETS
from mae_jax.runs.pretrain import pretrain

def state():
    loggers = {name: (logger.level, len(logger.handlers), len(logger.filters), logger.disabled)
               for name, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)}
    return {
        "signals": {number: str(signal.getsignal(number)) for number in signal.valid_signals()},
        "mask": str(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "wakeup": signal.set_wakeup_fd(-1),
        "loggers": {name: loggers[name] for name in ("absl", "asyncio", "jax", "root") if name in loggers},
        "root": (logging.root.level, len(logging.root.handlers)),
        "warnings": [str(one) for one in warnings.filters],
        "environ": dict(os.environ),
        "jax": {name: str(value) for name, value in jax.config.values.items()},
        "hooks": (sys.unraisablehook is sys.__unraisablehook__, sys.excepthook is sys.__excepthook__),
        "gc": (gc.isenabled(), gc.get_threshold()),
        "pillow": Image.core.get_blocks_max(),
        "opencv": cv2.getNumThreads(),
        "threads": sorted(thread.name for thread in threading.enumerate() if not thread.daemon),
        "cwd": os.getcwd(),
        "umask": (os.umask(0o22), os.umask(0o22)),
    }

recipe = PRESETS["digits"]()
stack = dataclasses.replace(recipe.model.encoder, width=16, depth=1, heads=2)
model = dataclasses.replace(recipe.model, encoder=stack, decoder=dataclasses.replace(stack, width=8))
config = dataclasses.replace(
    recipe, model=model, data=sys.argv[1], batch_size=8, steps=4, log_every=1, save_every=2, devices=1,
    workdir=sys.argv[2], workers=json.loads(sys.argv[3]),
)
jax.numpy.zeros(1).block_until_ready()
before, finished = state(), []
thread = threading.Thread(target=lambda: finished.append(pretrain(config).step))
thread.start()
thread.join()
after = state()
print(json.dumps([finished, [name for name in before if before[name] != after[name]]]))
"""


def test_a_run_in_a_thread_changes_nothing_of_its_caller(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(16):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (12, 12), np.uint8)).save(tmp_path / "images" / f"{number}.png")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for workers in (0, 1):
        done = subprocess.run(
            [
                sys.executable,
                "-W",
                "error",
                script,
                f"folder:{tmp_path}/images",
                tmp_path / f"run{workers}",
                str(workers),
            ],
            capture_output=True,
            text=True,
            check=False,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        )
        assert done.returncode == 0, done.stderr
        finished, changed = json.loads(done.stdout.splitlines()[-1])
        assert finished == [4]
        assert changed == []
