"""Figures against numbers worked out by hand."""

import pytest

from mae_jax.bench.recipe import bench_config
from mae_jax.bench.run import show
from mae_jax.bench.table import MatrixRate, figures, lacks_memory, reason
from mae_jax.models.flops import training_flops
from tests.refusals import refused


def test_figures_of_a_batch():
    config = bench_config("vit_base_patch16", 256, "bfloat16")
    found = figures(config, [0.5, 0.25, 0.1], 3 << 20, 7.5, MatrixRate(6e14, 8192, "bfloat16"))
    assert (found["images_per_second"], found["milliseconds"], found["timed_steps"]) == (1024, 250, 3)
    assert found["tflops_per_second"] == pytest.approx(1024 * training_flops(config.model) / 1e12)
    assert found["share_of_matrix_rate"] == pytest.approx(found["tflops_per_second"] / 600)
    assert (found["peak_mib"], found["compile_seconds"]) == (3, 7.5)


def test_mask_tokens_cost_a_factor(capsys):
    common = {
        "side": "jax",
        "model": "vit_large_patch16",
        "batch": 8,
        "dtype": "float32",
        "device": "x",
        "version": "jax 1",
        "matrix_size": 2048,
    }
    numbers = {"images_per_second": 1.0, "tflops_per_second": 1.0, "share_of_matrix_rate": 0.5, "peak_mib": 1.0}
    rest = {"compile_seconds": 1.0, "matrix_tflops_per_second": 2.0}
    rows = [
        common | numbers | rest | {"mask_tokens": tokens, "milliseconds": ms}
        for tokens, ms in ((True, 300.0), (False, 100.0))
    ]
    assert show(iter(rows), "vit_large_patch16", as_json=False) == 0
    assert "3.00 times as fast as with (the paper: 2.8)" in capsys.readouterr().out


def test_a_row_that_failed_is_shown_and_is_a_failure(capsys):
    assert show(iter([{"side": "jax", "batch": 8, "failed": "out of memory"}]), "digits", as_json=False) == 1
    assert "out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "batch", "attention", "field", "words"),
    [
        ("vit_b", 8, "xla", "model", "model vit_b is unknown; there are vit_tiny_patch16"),
        ("digits", 0, "xla", "batch", "batch 0 must be positive"),
        ("digits", 8, "cudnn", "model", "attention cudnn needs dtype bfloat16, not float32"),
    ],
)
def test_what_cannot_be_timed_is_refused(name, batch, attention, field, words):
    with refused(field, words):
        bench_config(name, batch, "float32", attention=attention)


@pytest.mark.parametrize(
    ("errors", "found"),
    [
        ("", "exit code 1"),
        ("Traceback\nValueError: no\n\n", "ValueError: no"),
        ("RESOURCE_EXHAUSTED: 3 GB\nTraceback was filtered\n", "RESOURCE_EXHAUSTED: 3 GB"),
        ("torch.OutOfMemoryError: CUDA out of memory.\nbye", "torch.OutOfMemoryError: CUDA out of memory."),
    ],
)
def test_the_line_with_the_reason_is_found(errors, found):
    assert reason(errors, 1) == found


def test_a_process_that_was_killed_lacked_memory():
    assert lacks_memory(reason("a warning", -9))
    assert lacks_memory("RuntimeError: DNN library initialization failed.")
    notice = "-" * 20 + "\nFor simplicity, JAX has removed its internal frames from the traceback.\n"
    assert (
        reason(f"Traceback\nRuntimeError: cuDNN is not detected.\n{notice}", 1)
        == "RuntimeError: cuDNN is not detected."
    )
    assert not lacks_memory(reason("ValueError: no", 1))
