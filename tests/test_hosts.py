"""Joining, gathering and parting, in real processes that train nothing; real runs are in tests/integration."""

import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from mae_jax import hosts as module
from mae_jax import joining
from mae_jax.hosts import Hosts, check_platform, joined
from tests.processes import free_port
from tests.refusals import refused

SCRIPT = """
import os, signal, sys, time
import jax, jax.numpy as jnp
from mae_jax.config import PretrainConfig
from mae_jax.errors import StatedError
from mae_jax.hosts import joined

def collective():
    everywhere = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = (jax.sharding.NamedSharding(everywhere, jax.sharding.PartitionSpec(*axes)) for axes in ("x", ()))
    ones = jax.make_array_from_process_local_data(rows, jnp.ones((1, 2)))
    return jax.block_until_ready(jax.jit(jnp.sum, out_shardings=whole)(ones))

where = dict(zip(("coordinator", "process_id", "num_processes"), sys.argv[1:]))
where = {name: value if name == "coordinator" else int(value) for name, value in where.items()}
try:
    with joined(PretrainConfig(engine="jit", workdir="runs/w", **where)) as hosts:
        first = hosts.first
        BODY
except StatedError as error:
    print(error, file=sys.stderr, flush=True)
    os._exit(1)
"""


def start(body, environment, *words):
    script = SCRIPT.replace("BODY", body.strip().replace("\n", "\n        "))
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": ""} | environment,
    )


def end(processes):
    """Exit code, output and errors of each."""
    try:
        texts = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *pair) for process, pair in zip(processes, texts, strict=True)]


def two(body):
    """Two hosts by flags."""
    address = f"127.0.0.1:{free_port()}"
    return [start(body, {}, address, index, 2) for index in range(2)]


def by_slurm(body):
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
    job |= {"SLURM_STEP_NUM_TASKS": "2", "JAX_COORDINATOR_PORT": str(free_port())}
    return [start(body, job | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}) for task in range(2)]


def by_open_mpi(body):
    job = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"}
    job |= {"JAX_COORDINATOR_PORT": str(free_port())}
    return [
        start(body, job | {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]


def by_jax(body):
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    return [start(body, job | {"JAX_PROCESS_ID": str(index)}) for index in range(2)]


GATHER = "print([hosts.gather('topic', f'{hosts.index} {n}') for n in range(3)])"


@pytest.mark.parametrize("launch", [by_slurm, by_open_mpi, by_jax])
def test_launched_hosts_gather_as_often_as_they_like(launch):
    done = end(launch(GATHER))
    assert [(code, out.strip()) for code, out, _ in done] == [
        (0, str([["0 0", "1 0"], ["0 1", "1 1"], ["0 2", "1 2"]]))
    ] * 2
    assert all("Traceback" not in err for _, _, err in done)


@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_fails_leaves_word(victim):
    """And is not waited for."""
    began = time.monotonic()
    done = end(two(f"if hosts.index == {victim}: raise StatedError('no disk')\nhosts.gather('topic', '')"))
    assert time.monotonic() - began < 60
    assert [code for code, _, _ in done] == [1, 1]
    assert done[victim][2].splitlines()[-1] == "no disk"
    assert f"host {victim} of 2 has failed: no disk" in done[1 - victim][2]


def test_one_that_is_killed_breaks_a_step_of_the_others():
    """At once: the connection between them is gone."""
    body = """
collective()
if not first: os.kill(os.getpid(), signal.SIGKILL)
while True: collective()
"""
    (code, _, err), (killed, _, _) = end(two(body))
    assert (code, killed) == (1, -9)
    assert "an operation of all 2 hosts has failed, as it does when one is gone" in err
    assert "it continues from the newest checkpoint in runs/w, on fewer hosts if need be, as long as batch_size" in err


def test_without_host_0_jax_aborts():
    body = "hosts.gather('topic', '')\nif first: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    assert [code for code, _, _ in end(two(body))] == [-9, -6]


@pytest.mark.extended
@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_is_stopped_for_a_minute_goes_on(victim):
    """Extended, since to wait is all it does."""
    body = "began = time.monotonic()\nwhile time.monotonic() < began + 75: collective()\nhosts.gather('topic', '')"
    processes = two(body)
    time.sleep(10)
    processes[victim].send_signal(signal.SIGSTOP)
    time.sleep(60)
    processes[victim].send_signal(signal.SIGCONT)
    assert [code for code, _, _ in end(processes)] == [0, 0]


def test_alone_there_is_nobody_to_wait_for(tiny):
    with joined(tiny(coordinator="a:1", process_id=0, num_processes=1)) as hosts:
        assert hosts == Hosts()
        assert hosts.first
        assert hosts.gather("topic", "text") == ["text"]


def test_alone_on_purpose_needs_no_address(tiny):
    with joined(tiny(num_processes=1)) as hosts:
        assert hosts == Hosts()


def test_a_failure_inside_is_the_callers(tiny):
    with pytest.raises(RuntimeError, match="inside"), joined(tiny()):
        raise RuntimeError("inside")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_port_in_use_is_refused(tiny, address):
    """JAX itself crashes."""
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as server:
        port = server.getsockname()[1]
        config = tiny(coordinator=f"127.0.0.1:{port}", process_id=0, num_processes=2, engine="jit")
        with refused("coordinator", f"cannot listen on port {port}", "Address already in use"), joined(config):
            pass


@pytest.mark.parametrize(("host", "reason"), [("127.0.0.1", "Connection refused"), ("nowhere.invalid", "Errno -")])
def test_where_nobody_listens_the_reason_is_given_at_once(tiny, monkeypatch, capsys, host, reason):
    monkeypatch.setattr(joining, "START_WITHIN", 0)
    config = tiny(coordinator=f"{host}:{free_port()}", process_id=1, num_processes=2, engine="jit")
    with refused("coordinator", "--process-id", reason), joined(config):
        pass
    monkeypatch.setattr(joining, "START_WITHIN", 0.3)
    with refused("coordinator"), joined(config):
        pass
    assert f"host 1 of 2 waits up to 0.3 s for host 0 at {config.coordinator} (" in capsys.readouterr().err


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'cuda'")])
def test_a_platform_that_is_not_there_is_named(monkeypatch, error):
    def fail():
        raise error

    config = SimpleNamespace(values={"jax_platforms": "cuda"})
    monkeypatch.setattr(module, "jax", SimpleNamespace(local_devices=fail, config=config))
    with refused("JAX_PLATFORMS", "JAX_PLATFORMS is cuda", str(error)):
        check_platform()
