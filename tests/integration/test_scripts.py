"""The scripts that try what the README claims, in short."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.quick import quick

from .conftest import ROOT, kept_programs


@pytest.mark.slow
def test_nothing_is_lost(tmp_path_factory: pytest.TempPathFactory) -> None:
    command = [sys.executable, "scripts/fault_drill.py", "--count=1", "--seed=1"]
    environment = os.environ | quick(devices=1) | kept_programs(tmp_path_factory)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert "survived 1 / tried 1" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0


@pytest.mark.slow
def test_every_engine_computes_what_one_device_computes(tmp_path_factory: pytest.TempPathFactory) -> None:
    command = [sys.executable, "scripts/compare_engines.py", "--quick"]
    environment = os.environ | quick(devices=1) | kept_programs(tmp_path_factory)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(", within ") == 1


@pytest.mark.slow
def test_golden_losses_are_recorded_and_compared(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = os.environ | quick(devices=1) | kept_programs(tmp_path_factory)

    def call(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "scripts/golden_losses.py", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)

    file = tmp_path / "record.json"
    done = call(f"--record={file}", "--steps=2", "--runs", "pretrain")
    assert done.returncode == 0, done.stdout + done.stderr
    assert call(f"--compare={file}").stdout.endswith("equal to the bit\n")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    differences = importlib.import_module("golden_losses").differences
    record = json.loads(file.read_text())
    losses = record["pretrain"]["losses"]
    assert list(losses) == ["step 1", "step 2"]
    loss = float.fromhex(losses["step 2"])
    other = {"pretrain": record["pretrain"] | {"losses": losses | {"step 2": (loss * (1 + 1e-13)).hex()}}}
    assert differences(record, other, 1e-12) == []
    (line,) = differences(record, other, 0)
    assert line == f"pretrain: losses, step 2: {loss!r}, now {loss * (1 + 1e-13)!r}"
