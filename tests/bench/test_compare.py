"""What scripts/bench_step.py makes of sides that fail, beside each other or alone."""

import importlib
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

from mae_jax.bench.recipe import bench_config

CONFIG = bench_config("digits", 8, "float32")
FAILED = {"batch": 8, "failed": "out of memory"}


@pytest.fixture
def bench_step(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    return importlib.import_module("bench_step")


def side(name, milliseconds):
    matrix = (1e12, 8192, "float32") if name == "jax" else None
    about = {"version": name, "device": "x", "compile_seconds": 0.0, "matrix": matrix, "peak_bytes": 1 << 20}
    return SimpleNamespace(name=name, about=about, rounds=[[milliseconds / 1e3] * 3] * 2)


def rows(bench_step, monkeypatch, fits):
    """Of sides that take 10, 20 and 30 ms; `fits` says of names whether they have memory at once."""
    names = ["jax", "torch", "torch-compile"]
    took = dict(zip(names, (10, 20, 30), strict=True))

    def timed(asked, config, arguments):
        if not fits(asked):
            return [], FAILED | {"side": asked[0]}
        return [side(name, took[name]) for name in asked], {}

    monkeypatch.setattr(bench_step, "timed", timed)
    return bench_step.compare(names, CONFIG, Namespace(model="digits"))


@pytest.mark.parametrize("most", [3, 1])
def test_ratios_are_of_the_first_side_also_where_each_runs_alone(bench_step, monkeypatch, most):
    found = rows(bench_step, monkeypatch, lambda names: len(names) <= most)
    assert [row["ratio_first_over_this"] for row in found] == pytest.approx([1, 2, 3])
    assert [row["in_turn"] for row in found] == [most == 3] * 3
    assert found[1]["matrix_tflops_per_second"] == 1


@pytest.mark.parametrize("broken", ["jax", "torch-compile"])
def test_a_side_that_fails_for_itself_leaves_the_turns_to_the_rest(bench_step, monkeypatch, capsys, broken):
    why = {"failed": "no compiler found", "batch": 8, "side": broken}
    names = ["jax", "torch", "torch-compile"]

    def timed(asked, config, arguments):
        return ([], why) if broken in asked else ([side(name, 10) for name in asked], {})

    monkeypatch.setattr(bench_step, "timed", timed)
    found = bench_step.compare(names, CONFIG, Namespace(model="digits"))
    assert [row["side"] for row in found] == names
    assert [row.get("in_turn") for row in found] == [None if name == broken else True for name in names]
    assert [row.get("ratio_first_over_this") for row in found] == ([None] * 3 if broken == "jax" else [1, 1, None])
    bench_step.report(found, Namespace(json=False, model="digits", rounds=2, steps=3))
    assert "memory" not in capsys.readouterr().out


def test_without_the_first_side_there_is_no_ratio(bench_step, monkeypatch):
    found = rows(bench_step, monkeypatch, lambda names: names == ["torch"])
    assert ["failed" in row for row in found] == [True, False, True]
    assert found[1]["ratio_first_over_this"] is None


@pytest.mark.parametrize(("start", "limit"), [(16, 100), (256, 100), (8, 8), (9, 12), (100, 90)])
def test_the_largest_batch_is_found_to_a_sixteenth(bench_step, monkeypatch, start, limit):
    def timed(names, config, arguments):
        return ([side("jax", 1)], {}) if config.batch_size <= limit else ([], FAILED | {"side": "jax"})

    monkeypatch.setattr(bench_step, "timed", timed)
    config = bench_config("digits", start, "float32", mask_tokens=True)
    found = bench_step.largest_batch(config, Namespace(model="digits"))
    assert found["batch"] <= limit < found["largest_batch_below"]
    assert found["largest_batch_below"] - found["batch"] <= max(8, found["batch"] // 16)
    assert found["mask_tokens"]


def test_not_even_eight_images_fit(bench_step, monkeypatch):
    monkeypatch.setattr(bench_step, "timed", lambda names, config, arguments: ([], FAILED | {"side": "jax"}))
    assert bench_step.largest_batch(CONFIG, Namespace(model="digits")) == FAILED | {"side": "jax"}


def test_the_largest_batch_is_bounded_by_memory_alone(bench_step, monkeypatch, capsys):
    def compare(names, config, arguments):
        why = "out of memory" if config.batch_size > 100 else ""
        if config.batch_size > limit:
            why = "an illegal address"
        return [{"side": "jax", "batch": config.batch_size} | ({"failed": why} if why else {})]

    monkeypatch.setattr(bench_step, "compare", compare)
    limit = 1000
    assert bench_step.largest_batch(CONFIG, None) == {"side": "jax", "batch": 96, "largest_batch_below": 104}
    limit = 50
    assert bench_step.largest_batch(CONFIG, None)["failed"] == "an illegal address"
