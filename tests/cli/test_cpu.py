"""Settings of a process that computes on the CPU."""

import math
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from mae_jax.cli import cpu
from mae_jax.config import MODELS
from mae_jax.presets.pretraining import PRESETS
from tests.quick import as_users_compile

CPU = {"JAX_PLATFORMS": "cpu"}

FAULTS = """
import ctypes, resource, sys, threading
from mae_jax.cli.cpu import keep_freed_memory

settings, size, thread = sys.argv[1], int(sys.argv[2]) << 20, sys.argv[3] == "thread"
if settings != "plain":
    assert keep_freed_memory(one_arena=settings == "one arena")
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]


def ask():
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [libc.malloc(size) for _ in range(4)]
        for block in blocks:
            ctypes.memset(block, 1, size)
        for block in blocks:
            libc.free(block)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


worker = threading.Thread(target=ask)
worker.start() if thread else ask()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
@pytest.mark.parametrize(
    ("settings", "megabytes", "where"),
    [("one arena", 100, "main"), ("one arena", 100, "thread"), ("an arena each", 60, "thread")],
)
def test_blocks_that_come_again_are_not_cleared_again(settings, megabytes, where):
    """In a thread the largest that have a place are of FITTING bytes, each in a heap of its own."""
    plain, kept = (
        int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, one, str(megabytes), where], check=True, capture_output=True, text=True
            ).stdout
        )
        for one in ("plain", settings)
    )
    assert kept < 100 < plain


def test_flags_that_are_given_stay(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=true --xla_dump_to=x")
    cpu.tune_compiler(block=5)
    cpu.tune_compiler(block=6)
    assert os.environ["XLA_FLAGS"] == (
        "--xla_cpu_multi_thread_eigen=true --xla_dump_to=x --xla_backend_optimization_level=1 "
        "--xla_multiheap_size_constraint_per_heap=5"
    )


def test_a_file_of_flags_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "flags.txt")
    cpu.tune_compiler(block=5)
    assert os.environ["XLA_FLAGS"] == "flags.txt"


def test_beside_an_accelerator_nothing_is_set(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: object())
    cpu.settle(MODELS["vit_base_patch16"], 256)
    assert os.environ["XLA_FLAGS"] == ""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert cpu.alone()


@pytest.mark.parametrize(
    ("model", "batch", "one"),
    [
        (PRESETS["digits"]().model, 128, False),
        (PRESETS["mnist_tutorial"]().model, 128, False),
        (MODELS["vit_small_patch16"], 16, False),
        (MODELS["vit_small_patch16"], 32, True),
        (replace(MODELS["vit_small_patch16"], dtype="float64"), 16, True),
    ],
)
def test_steps_with_large_buffers_have_one_arena(monkeypatch, model, batch, one):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    given = []
    monkeypatch.setattr(cpu, "keep_freed_memory", lambda one_arena: not given.append(one_arena))
    cpu.settle(model, batch)
    assert given == [one]
    block = max(60 << 20, cpu.largest_buffer(model, batch))
    assert f"--xla_multiheap_size_constraint_per_heap={block}" in os.environ["XLA_FLAGS"]


FOUND = """
import sys
from mae_jax.config import MODELS
from mae_jax.cli import cpu

cpu.settle(MODELS["vit_small_patch16"], int(sys.argv[1]))
import jax

print(jax.devices()[0].platform)
"""


@pytest.mark.parametrize("over", [False, True])
def test_no_size_of_step_keeps_jax_from_starting(over):
    """A preset's batch for many devices is begun on a CPU too, to see whether it can be."""
    batch = cpu.LARGEST_BLOCK // cpu.largest_buffer(MODELS["vit_small_patch16"], 1) + over
    done = subprocess.run(
        [sys.executable, "-c", FOUND, str(batch)], capture_output=True, text=True, env=as_users_compile() | CPU
    )
    assert (done.stdout, done.stderr) == ("cpu\n", "")


STEP = """
import sys
from mae_jax.bench.step import bench_config
from mae_jax.cli import cpu

config = bench_config(sys.argv[1], int(sys.argv[2]), "float32", sys.argv[3] == "True")
cpu.settle(config.model, config.batch_size)
from mae_jax.bench.step import ready_step

print(ready_step(config).program())
"""


@pytest.mark.parametrize(("name", "batch", "mask_tokens"), [("mnist_tutorial", 2048, False), ("digits", 4096, True)])
def test_the_largest_buffer_of_a_step_is_known(name, batch, mask_tokens):
    """XLA would warn of each that is larger than the block it was told, in thousands of lines."""
    done = subprocess.run(
        [sys.executable, "-c", STEP, name, str(batch), str(mask_tokens)],
        check=True,
        capture_output=True,
        text=True,
        env=as_users_compile() | CPU,
    )
    assert "heap_simulator" not in done.stderr
    shapes = re.findall(r"f32\[([\d,]+)\]", done.stdout)
    largest = max(4 * math.prod(map(int, shape.split(","))) for shape in shapes)
    assert largest == cpu.largest_buffer(PRESETS[name]().model, batch) > cpu.FITTING
