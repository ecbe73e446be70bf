"""`mae-jax bench` and the benchmark beside PyTorch, in short."""

import json
import os
import subprocess
import sys

import pytest

from .conftest import ROOT, Run, quick_compilation

# grain, tensorflow-datasets and tyro are absent from machines for benchmarks.
BARE = (
    "import runpy, sys; sys.modules |= dict.fromkeys(['grain', 'tensorflow_datasets', 'tyro']); "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def test_a_row_of_figures(run: Run) -> None:
    done = run("bench", "digits", "--batches", "8", "--steps=2", "--warmup=1", "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["batch"], row["timed_steps"], row["matrix_size"]) == (8, 2, 1024)
    assert row["images_per_second"] == pytest.approx(8e3 / row["milliseconds"])
    assert row["compile_seconds"] > 0
    assert row["peak_mib"] > 100


def test_what_cannot_be_timed_is_said(run: Run) -> None:
    done = run("bench", "digits", "--batches", "8", "0")
    assert (done.returncode, done.stderr) == (1, "mae-jax: batch 0 must be positive\n")


def test_this_projects_side_needs_no_data_libraries(tmp_path_factory: pytest.TempPathFactory) -> None:
    words = ["scripts/bench_step.py", "--serve=jax", "--model=digits", "--batch=8", "--warmup=1"]
    done = subprocess.run(
        [sys.executable, "-c", BARE, *words],
        input="2\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | quick_compilation(tmp_path_factory),
    )
    assert done.returncode == 0, done.stderr
    about, timed = map(json.loads, done.stdout.splitlines())
    assert about["version"].startswith("jax ")
    assert len(timed["seconds"]) == 2


def test_the_setting_imports_no_framework() -> None:
    """Else the memory of one would count as the other's."""
    modules = "mae_jax.bench.setting, mae_jax.bench.table, parity.torch_mae, parity.torch_train"
    said = f"import sys, {modules}; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False\n"


@pytest.mark.slow
def test_sides_in_turn_over_batches_and_mask_tokens(tmp_path_factory: pytest.TempPathFactory) -> None:
    words = ["--model=digits", "--batch", "8", "--against=torch", "--rounds=2", "--steps=2", "--mask-tokens=both"]
    done = bench_step(tmp_path_factory, *words, "--json")
    assert done.returncode == 0, done.stderr
    with_tokens, without = map(json.loads, done.stdout.splitlines())
    assert [row["side"] for row in with_tokens + without] == ["jax", "torch"] * 2
    assert [row["mask_tokens"] for row in with_tokens + without] == [True, True, False, False]
    assert with_tokens[0]["tflops_per_second"] * with_tokens[0]["milliseconds"] > 1.4 * (
        without[0]["tflops_per_second"] * without[0]["milliseconds"]
    )
    assert without[1]["ratio_first_over_this"] > 0


def test_a_side_that_fails_leaves_a_row(tmp_path_factory: pytest.TempPathFactory) -> None:
    done = bench_step(tmp_path_factory, "--model=digits", "--batch", "8", "--against=", "--json", JAX_PLATFORMS="none")
    assert done.returncode == 1
    ((row,),) = map(json.loads, done.stdout.splitlines())
    assert row["side"] == "jax"
    assert "none" in row["failed"]


def bench_step(factory: pytest.TempPathFactory, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "scripts/bench_step.py", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | quick_compilation(factory) | variables,
    )
