"""What the command line sets for its own process: malloc and XLA on a CPU, compiled programs kept."""

import math
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from mae_jax.cli import process
from mae_jax.config import MODELS
from mae_jax.presets.pretraining import PRESETS
from tests.quick import as_users_compile

CPU = {"JAX_PLATFORMS": "cpu"}

FAULTS = """
import ctypes, resource, sys, threading
from mae_jax.cli.process import keep_freed_memory

arenas, size, thread = sys.argv[1], int(sys.argv[2]) << 20, sys.argv[3] == "thread"
if arenas != "plain":
    assert keep_freed_memory(one_arena=arenas == "one arena")
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
    ("arenas", "megabytes", "where"),
    [("one arena", 100, "main"), ("one arena", 100, "thread"), ("an arena each", 60, "thread")],
)
def test_blocks_that_come_again_are_not_cleared_again(arenas, megabytes, where):
    """In a thread the largest that have a place are of FITTING bytes, each in a heap of its own."""
    plain, kept = (
        int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, one, str(megabytes), where], check=True, capture_output=True, text=True
            ).stdout
        )
        for one in ("plain", arenas)
    )
    assert kept < 100 < plain


def test_flags_that_are_given_stay(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=true --xla_dump_to=x")
    process.tune_compiler(block=5)
    process.tune_compiler(block=6)
    assert os.environ["XLA_FLAGS"] == (
        "--xla_cpu_multi_thread_eigen=true --xla_dump_to=x --xla_backend_optimization_level=1 "
        "--xla_multiheap_size_constraint_per_heap=5"
    )


def test_a_version_that_was_never_seen_gets_no_flags(monkeypatch):
    """It would end the process at one that it does not know."""
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(process.importlib.metadata, "version", lambda name: "0.13.0")
    process.tune_compiler(block=5)
    assert os.environ["XLA_FLAGS"] == ""


def test_the_version_here_knows_all_flags():
    """Or it is one that gets none."""
    program = (
        "from mae_jax.cli import process; process.tune_compiler(2**26); import jax; print(jax.devices()[0].platform)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=as_users_compile() | CPU)
    assert (done.stdout, done.stderr) == ("cpu\n", "")


def test_a_file_of_flags_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "flags.txt")
    process.tune_compiler(block=5)
    assert os.environ["XLA_FLAGS"] == "flags.txt"


def test_beside_an_accelerator_nothing_is_set(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(process.importlib.util, "find_spec", lambda name: object())
    process.set_up(MODELS["vit_base_patch16"], 256)
    assert os.environ["XLA_FLAGS"] == ""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert process.alone()


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
    monkeypatch.setattr(process, "keep_freed_memory", lambda one_arena: not given.append(one_arena))
    process.set_up(model, batch)
    assert given == [one]
    block = max(60 << 20, process.largest_buffer(model, batch))
    assert f"--xla_multiheap_size_constraint_per_heap={block}" in os.environ["XLA_FLAGS"]


FOUND = """
import sys
from mae_jax.config import MODELS
from mae_jax.cli import process

process.set_up(MODELS["vit_small_patch16"], int(sys.argv[1]))
import jax

print(jax.devices()[0].platform)
"""


@pytest.mark.parametrize("over", [False, True])
def test_no_size_of_step_keeps_jax_from_starting(over):
    """A preset's batch for many devices is begun on a CPU too, to see whether it can be."""
    batch = process.LARGEST_BLOCK // process.largest_buffer(MODELS["vit_small_patch16"], 1) + over
    done = subprocess.run(
        [sys.executable, "-c", FOUND, str(batch)], capture_output=True, text=True, env=as_users_compile() | CPU
    )
    assert (done.stdout, done.stderr) == ("cpu\n", "")


STEP = """
import dataclasses
from mae_jax.bench.recipe import bench_config
from mae_jax.cli import process

config = bench_config("digits", 4096, "float32", mask_tokens=True)
model = config.model
encoder, decoder = dataclasses.replace(model.encoder, depth=1), dataclasses.replace(model.decoder, depth=2)
config = dataclasses.replace(config, model=dataclasses.replace(model, encoder=encoder, decoder=decoder))
process.set_up(config.model, config.batch_size)
from mae_jax.bench.step import ready_step

print(ready_step(config).program())
"""


def test_the_largest_buffer_of_a_step_is_known():
    """XLA would warn of each that is larger than a block, in thousands of lines."""
    done = subprocess.run(
        [sys.executable, "-c", STEP],
        check=True,
        capture_output=True,
        text=True,
        env=as_users_compile() | CPU,
    )
    assert "heap_simulator" not in done.stderr
    shapes = re.findall(r"f32\[([\d,]+)\]", done.stdout)
    largest = max(4 * math.prod(map(int, shape.split(","))) for shape in shapes)
    assert largest == process.largest_buffer(PRESETS["digits"]().model, 4096) > process.FITTING


KEEP = """
import jax
from mae_jax.cli.process import keep_programs
print(keep_programs())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
"""
ADD = "print(jax.jit(lambda x: x + 1)(41))"
TWO_BLOCKS = """
x = jax.numpy.ones((1024, 1024))
print(jax.jit(lambda x: ((x @ x) @ (x @ x.T) @ (x.T @ x)).sum() + ((x.T @ x) @ (x @ x.T)).sum())(x))
"""
# Programs of 2 KB or so each, where there is room for few.
MANY = """
jax.config.update("jax_compilation_cache_max_size", 20_000)
for number in range(20):
    jax.jit(lambda x: x + number)(1)
print("done")
"""


def start(home, script, **environment):
    """A process that keeps programs, then runs the script; any warning ends it."""
    own = ("JAX_COMP", "JAX_ENABLE", "JAX_P")
    plain = {key: value for key, value in as_users_compile().items() if not key.startswith(own)}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", KEEP + script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=plain | {"XDG_CACHE_HOME": str(home)} | environment,
    )


def finish(process):
    """The words that it prints."""
    out, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    return out.split()


def call(home, script=ADD, **environment):
    return finish(start(home, script, **environment))


def programs(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith("-cache"))


def test_programs_are_kept_in_the_users_cache(tmp_path):
    folder, result = call(tmp_path)
    assert (result, os.path.dirname(folder)) == ("42", str(tmp_path / "mae_jax"))
    kept = programs(folder)
    assert any(name.startswith("jit__lambda") for name in kept)
    assert call(tmp_path) == [folder, "42"]
    assert programs(folder) == kept


def test_a_program_that_was_cut_short_is_made_again(tmp_path):
    """As a kill leaves it: JAX dates a program when it is whole."""
    folder, _ = call(tmp_path)
    (kept,) = [name for name in programs(folder) if name.startswith("jit__lambda")]
    whole = (tmp_path / "mae_jax" / folder / kept).read_bytes()
    (tmp_path / "mae_jax" / folder / kept).write_bytes(whole[:100])
    (tmp_path / "mae_jax" / folder / kept.replace("-cache", "-atime")).unlink()
    assert call(tmp_path) == [folder, "42"]
    assert (tmp_path / "mae_jax" / folder / kept).stat().st_size > 1000


def test_those_not_used_for_longest_go_and_several_processes_may_keep_at_once(tmp_path):
    started = [start(tmp_path, MANY) for _ in range(3)]
    ended = [finish(process) for process in started]
    assert [words[1] for words in ended] == ["done"] * 3
    folder = tmp_path / "mae_jax" / ended[0][0]
    kept = [folder / name for name in programs(folder)]
    assert 3 < len(kept) < 20
    assert sum(file.stat().st_size for file in kept) <= 20_000


@pytest.mark.parametrize(
    "environment",
    [
        {"XDG_CACHE_HOME": "/dev/null"},
        {"XDG_CACHE_HOME": "/proc"},
        {"JAX_ENABLE_COMPILATION_CACHE": "false"},
    ],
)
def test_where_nothing_can_be_kept_nothing_is(tmp_path, environment):
    assert call(tmp_path, **environment) == ["None", "42"]
    assert not list(tmp_path.iterdir())


def test_jaxs_own_variable_comes_first(tmp_path):
    assert call(tmp_path / "home", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own")) == [str(tmp_path / "own"), "42"]
    assert os.listdir(tmp_path) == ["own"]


def test_what_cannot_be_kept_is_no_matter(tmp_path):
    """A program with one block of memory is kept; with two it is not, and works."""
    one, two = tmp_path / "one", tmp_path / "two"
    flags = {"XLA_FLAGS": "--xla_multiheap_size_constraint_per_heap=5000000", "JAX_PLATFORMS": "cpu"}
    folders = [call(one, TWO_BLOCKS, JAX_PLATFORMS="cpu"), call(two, TWO_BLOCKS, **flags)]
    assert [result for _, result in folders] == [f"{1024.0**7 + 1024.0**5:.7e}"] * 2
    assert [any("jit__lambda" in name for name in programs(folder)) for folder, _ in folders] == [True, False]
