"""Meeting: a host that waits in vain says so. Real runs of several hosts are in tests/integration/test_hosts.py."""

import subprocess
import sys

import pytest

from mae_jax.hosts import Hosts, joined

SCRIPT = """
import sys
from mae_jax.config import PretrainConfig
from mae_jax import hosts
hosts.START_WITHIN = 2
config = PretrainConfig(coordinator="127.0.0.1:1", process_id=1, num_processes=2)
with hosts.joined(config):
    sys.exit(7)
"""


def test_alone_there_is_nobody_to_wait_for(tiny, monkeypatch):
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    with joined(tiny(coordinator="a:1", process_id=0, num_processes=1)) as hosts:
        assert hosts == Hosts()
        assert hosts.first
        assert hosts.gather("topic", "text") == ["text"]


def test_without_the_others_it_ends_with_a_sentence():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 1
    assert "mae-jax: the hosts did not come to coordinator 127.0.0.1:1 within 2 s. Check that all were started" in (
        done.stderr
    )


def test_a_failure_inside_is_the_callers(tiny):
    with pytest.raises(RuntimeError, match="inside"), joined(tiny()):
        raise RuntimeError("inside")
