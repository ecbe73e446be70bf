"""`mae-jax bench` and the benchmark beside PyTorch, in short."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mae_jax.bench.table import lacks_memory
from tests.processes import dies
from tests.quick import quick
from tests.refusals import refused

from .conftest import ROOT, Run, kept_programs

# These are absent from machines for benchmarks.
BARE = (
    "import runpy, sys; sys.modules |= dict.fromkeys(['dacite', 'grain', 'tensorflow_datasets', 'tyro']); "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)

BESIDE = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"}  # where a script finds its neighbours


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[int]:
    """A file that a job is to inherit."""
    with (tmp_path / "lock").open("w") as file:
        yield file.fileno()


def test_a_row_of_figures(run: Run) -> None:
    done = run("bench", "digits", "--batches", "8", "--steps=2", "--warmup=1", "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["batch"], row["timed_steps"], row["matrix_size"]) == (8, 2, 1024)
    assert row["images_per_second"] == pytest.approx(8e3 / row["milliseconds"])
    assert row["compile_seconds"] > 0
    assert row["peak_mib"] > 100


def test_a_step_that_finds_too_little_memory_leaves_a_row(run: Run) -> None:
    for batches in (["1000000000000"], ["8", "1000000000000"]):
        done = run("bench", "digits", "--batches", *batches, "--steps=1", "--warmup=1", "--json")
        rows = [json.loads(text) for text in done.stdout.splitlines()]
        assert (done.returncode, [row["batch"] for row in rows]) == (1, [int(batch) for batch in batches])
        assert ["failed" in row for row in rows] == [False] * (len(batches) - 1) + [True]
        assert lacks_memory(rows[-1]["failed"])
        assert "--debug" not in rows[-1]["failed"]


def test_this_projects_side_needs_no_data_libraries(tmp_path_factory: pytest.TempPathFactory) -> None:
    words = ["scripts/bench_side.py", "jax", "--model=digits", "--batch=8", "--warmup=1"]
    done = subprocess.run(
        [sys.executable, "-c", BARE, *words],
        input="2\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | quick(devices=1) | kept_programs(tmp_path_factory) | BESIDE,
    )
    assert done.returncode == 0, done.stderr
    about, timed = map(json.loads, done.stdout.splitlines())
    assert about["version"].startswith("jax ")
    assert len(timed) == 2


@pytest.mark.parametrize("name", ["bench_step.py", "bench_gpu.py", "profile_step.py"])
def test_what_a_machine_for_benchmarks_runs_needs_none_either(name: str) -> None:
    words = [sys.executable, "-c", BARE, f"scripts/{name}", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=os.environ | BESIDE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--model" in done.stdout


def test_the_recipe_imports_no_framework() -> None:
    pytest.importorskip("torch")
    """Else the memory of one would count as the other's."""
    modules = "mae_jax.bench.recipe, mae_jax.bench.table, parity.torch_mae, parity.torch_train"
    program = f"import sys, {modules}; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False\n"


@pytest.mark.slow
def test_sides_in_turn(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("torch")
    words = ["--model=digits", "--batch=8", "--against=torch", "--rounds=2", "--steps=2", "--mask-tokens=encoder"]
    done = bench_step(tmp_path_factory, *words, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["side"], row["mask_tokens"], row["in_turn"]) for row in rows] == [
        ("jax", True, True),
        ("torch", True, True),
    ]
    assert rows[0]["ratio_first_over_this"] == 1
    assert rows[1]["ratio_first_over_this"] > 0


def test_a_side_that_fails_leaves_a_row_for_each_batch(tmp_path_factory: pytest.TempPathFactory) -> None:
    words = ["--model=digits", "--batch", "8,9", "10", "--against=", "--json"]
    done = bench_step(tmp_path_factory, *words, JAX_PLATFORMS="none")
    assert done.returncode == 1
    rows = [row for (row,) in map(json.loads, done.stdout.splitlines())]
    assert [(row["side"], row["batch"]) for row in rows] == [("jax", 8), ("jax", 9), ("jax", 10)]
    assert all("none" in row["failed"] for row in rows)


def test_a_profile_names_operations_and_where_they_come_from(tmp_path_factory: pytest.TempPathFactory) -> None:
    done = script(tmp_path_factory, "profile_step.py", "--model=digits", "--batch=8", "--steps=2", "--rows=500")
    assert done.returncode == 0, done.stderr
    assert "digits, batch 8, float32" in done.stdout
    assert "dot" in done.stdout
    assert "encoder.blocks/block_*/mlp/fc*" in done.stdout


def test_the_gpu_table_goes_on_where_it_was_cut(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    words = [f"--out={tmp_path}", "--models", "digits", "--batch=8", "--rounds=1", "--dtype=float32", "--device=cpu"]
    whole = script(tmp_path_factory, "bench_gpu.py", *words, "--minutes=0")
    assert "0 jobs done, 5 left" in whole.stdout, whole.stderr
    compared = ["bench_step.py", "--model=digits", "--dtype=float32", "--device=cpu", "--json", "--rounds=1"]
    compared += ["--batch=8", "--against=torch,torch-compile"]
    row = {"side": "jax", "batch": 8, "failed": "out of memory"}
    done = json.dumps({"job": 0, "title": "Beside PyTorch", "words": compared, "rows": [row]})
    (tmp_path / "rows.jsonl").write_text(f'{done}\n{{"job": 1, "ti')
    assert "1 jobs done, 4 left" in script(tmp_path_factory, "bench_gpu.py", *words, "--minutes=0").stdout
    assert "out of memory" in (tmp_path / "report.md").read_text()
    other = script(tmp_path_factory, "bench_gpu.py", *words, "--batch=16", "--minutes=0")
    assert (other.returncode, "is of another command" in other.stderr) == (1, True)


def test_a_damaged_record_is_named(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (tmp_path / "rows.jsonl").write_text("{\n")
    done = script(tmp_path_factory, "bench_gpu.py", f"--out={tmp_path}", "--minutes=0", "--device=cpu")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "rows.jsonl, line 1, is damaged" in done.stderr
    assert (tmp_path / "rows.jsonl").read_text() == "{\n"


@pytest.mark.parametrize(
    "line",
    [
        b"5",
        b"\xff\xfe",
        b'{"job": 0}',
        b'{"job": "0", "title": "x", "words": ["--model=digits"], "text": "y"}',
        b'{"job": 0, "title": "x", "words": ["--model=digits"], "rows": [5]}',
        b'{"job": 0, "title": "x", "words": ["--model=digits"], "rows": [{"side": 1, "batch": 2, "failed": 3}]}',
        b'{"job": 0, "title": "x", "words": ["--model=digits"], "rows": [{"side": "jax", "batch": 2}]}',
    ],
)
def test_so_is_one_that_holds_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    bench_gpu = importlib.import_module("bench_gpu")
    record, whole = tmp_path / "rows.jsonl", {"job": 0, "title": "x", "words": ["--model=digits"], "text": "y"}
    record.write_text(json.dumps(whole) + "\n")
    assert bench_gpu.recorded(record) == [whole]
    record.write_bytes(line + b"\n")
    with refused("rows.jsonl", "rows.jsonl, line 1, is damaged: delete it, or choose another --out"):
        bench_gpu.recorded(record)


def test_jobs_that_failed_are_counted_and_run_again_on_request(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    words = [f"--out={tmp_path}", "--models", "digits", "--batch=8", "--rounds=1", "--dtype=float32", "--device=cpu"]
    compared = ["bench_step.py", "--model=digits", "--dtype=float32", "--device=cpu", "--json", "--rounds=1"]
    compared += ["--batch=8", "--against=torch,torch-compile"]
    row = {"side": "torch", "batch": 8, "failed": "no module named torch"}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"job": 0, "title": "x", "words": compared, "rows": [row]}) + "\n")
    done = script(tmp_path_factory, "bench_gpu.py", *words, "--minutes=0")
    assert (done.returncode, done.stderr) == (1, "1 failed: run this again with --retry\n")
    assert "0 jobs done, 5 left" in script(tmp_path_factory, "bench_gpu.py", *words, "--minutes=0", "--retry").stdout


def test_a_first_start_is_cold_and_no_job_takes_for_ever(
    tmp_path: Path, lock: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    bench_gpu = importlib.import_module("bench_gpu")
    left = tmp_path / "compiled" / "program"
    for title, stays in ((bench_gpu.SECOND, True), (bench_gpu.FIRST, False)):
        left.parent.mkdir(exist_ok=True)
        left.touch()
        done = bench_gpu.run(3, (title, ["bench_step.py", "--model=digits", bench_gpu.KEEP]), tmp_path, 0.001, lock)
        assert done["rows"][0]["failed"] == "took longer than 0.001 minutes"
        assert left.exists() == stays


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_benchmark_that_is_stopped_leaves_no_side_behind(
    number: int, code: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Only the benchmark gets the signal, as soon as its side is there: it may not know it yet."""
    process = subprocess.Popen(
        [sys.executable, "scripts/bench_step.py", "--model=digits", "--batch=8", "--against="],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | quick(devices=1) | kept_programs(tmp_path_factory),
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until = time.monotonic() + 60
    while not (sides := children.read_text().split()) and time.monotonic() < until:
        pass
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (code, "", "")
    assert [dies(int(side)) for side in sides] == [True]


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["bench_step", "--model=digits", "--against=jax-cudnn"], "attention cudnn"),
        (["bench_step", "--dtype=bfloat16", "--attention=cudnn", "--against=jax-cudnn"], "--against jax-cudnn"),
        (["bench_step", "--against=torch,torch"], "--against torch,torch"),
        (["bench_step", "--against=jax"], "--against jax"),
        (["bench_gpu", "--dtype=float32", "--attention=cudnn"], "--attention cudnn"),
        (["bench_gpu", "--device=cpu", "--attention=cudnn"], "--attention cudnn"),
        (["bench_gpu", "--models", "digits", "digits"], "--models digits digits"),
        (["bench_gpu", "--job-minutes=0"], "--job-minutes 0"),
        (["bench_gpu", "--out=pyproject.toml", "--device=cpu"], "--out pyproject.toml"),
        (["plan_gpu", "--model=vit_giant"], "model vit_giant"),
        (["plan_gpu", "--rows=0"], "--rows 0"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_line(
    words: list[str], field: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: each is refused before anything is started."""
    for name in ("JAX_PLATFORMS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"):  # which plan_gpu sets
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(sys, "argv", words)
    module, before = importlib.import_module(words[0]), signal.getsignal(signal.SIGTERM)
    try:
        code = module.ended(module.main)
        errors = capsys.readouterr().err
    except SystemExit as ended:
        code, errors = 1, f"{ended.code}\n"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (code, errors.count("\n")) == (1, 1)
    assert field in errors


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["profile_step.py", "--dtype=bfloat16", "--attention=cudnn", "--device=cpu"], "attention cudnn"),
        (["profile_step.py", "--model=digits", "--device=gpu"], "--device cpu"),
    ],
)
def test_a_device_that_will_not_do_is_refused_in_a_line(
    words: list[str], field: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    done = script(tmp_path_factory, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert field in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is not None, reason="a compiler for GPUs may be here")
def test_a_plan_needs_the_compiler_for_gpus(tmp_path_factory: pytest.TempPathFactory) -> None:
    done = script(tmp_path_factory, "plan_gpu.py", "--model=digits", "--batch=8")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == 'there is no compiler for GPUs here: pip install "jax[cuda12]"\n'


def test_no_job_is_begun_without_a_gpu(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    done = script(tmp_path_factory, "bench_gpu.py", f"--out={tmp_path}", "--models=digits", "--dtype=float32")
    assert (done.returncode, "JAX finds no GPU here" in done.stderr) == (1, True)
    assert not list(tmp_path.iterdir())


def test_flags_reach_the_compiler_and_the_report(tmp_path: Path, lock: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    bench_gpu = importlib.import_module("bench_gpu")
    (flag, *_), given = bench_gpu.FLAGS, {}

    def started(command: list[str], env: dict[str, str], **_: object) -> "subprocess.CompletedProcess[str]":
        given.update(command=command, flags=env["XLA_FLAGS"])
        return subprocess.CompletedProcess(command, 1, "", "out of memory")

    monkeypatch.setattr(bench_gpu.subprocess, "run", started)
    tried = [job for job in bench_gpu.jobs(["digits"], 256, "float32", 1, "gpu", "xla") if job[0] == "XLA flags"]
    assert len(tried) == 1 + len(bench_gpu.FLAGS)
    row = bench_gpu.run(0, tried[1], tmp_path, 1.0, lock)
    assert flag in given["flags"].split()
    assert flag not in given["command"]
    assert f"XLA_FLAGS={flag} python scripts/bench_step.py" in bench_gpu.report([row])


def test_both_kinds_of_attention_are_compared_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    bench_gpu = importlib.import_module("bench_gpu")
    models = ["vit_base_patch16", "vit_huge_patch14"]

    def jobs(dtype: str, attention: str) -> list[tuple[str, list[str]]]:
        found: list[tuple[str, list[str]]] = bench_gpu.jobs(models, 256, dtype, 10, "gpu", attention)
        return found

    compared = [words for title, words in jobs("bfloat16", "xla") if title == "Attention"]
    assert [words[1] for words in compared] == [f"--model={model}" for model in models]
    assert all("--against=jax-cudnn" in words for words in compared)
    assert not any("--attention=cudnn" in words for _, words in jobs("bfloat16", "xla"))
    assert all("--attention=cudnn" in words for _, words in jobs("bfloat16", "cudnn"))
    assert "Attention" not in [title for title, _ in jobs("float32", "xla") + jobs("bfloat16", "cudnn")]


def bench_step(factory: pytest.TempPathFactory, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return script(factory, "bench_step.py", *words, **variables)


def script(
    factory: pytest.TempPathFactory, name: str, *words: str, **variables: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, f"scripts/{name}", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | quick(devices=1) | kept_programs(factory) | variables,
    )
