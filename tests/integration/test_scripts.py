"""The scripts that try what the README claims, in short."""

import os
import subprocess
import sys

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
