"""One table: what is in the environment, and what a process does with it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_jax.config import PretrainConfig
from mae_jax.hosts import SIGNS
from mae_jax.launchers import LAUNCHERS, Joining, plan_joining
from tests.refusals import refused

ADDRESS = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}
KUBEFLOW = ADDRESS | {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "HOSTNAME": "pod"}
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}
SBATCH = JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = SBATCH | {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
}
ONE_MACHINE = STEP | {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
ARRAY = SBATCH | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_ARRAY_TASK_ID": "3"}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "PMIX_RANK": "1",
}
MPI4 = MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:5"}
TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "n1"}
HYDRA = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}
FLAGS = {"coordinator": "10.0.0.1:1234", "num_processes": 2, "process_id": 0}


def plan(environment, gpus=0, installed=(), **fields):
    return plan_joining(PretrainConfig(engine=fields.pop("engine", "jit"), **fields), environment, installed, gpus)


@pytest.mark.parametrize(
    ("environment", "fields"),
    [
        ({}, {}),
        (POD, {}),
        (POD | {"JOB_COMPLETION_INDEX": "3"}, {}),
        (JOB, {}),
        (SBATCH, {}),
        (ARRAY, {}),
        (ARRAY | {"PMIX_RANK": "0"}, {}),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"}, {}),
        ({"WORLD_SIZE": "1", "RANK": "0"}, {}),
        ({"RANK": "1"}, {}),
        (ADDRESS | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, {}),
        (ADDRESS | {"WORLD_SIZE": "1"}, {}),
        ({"http_proxy": "http://p:1"}, {}),
        (STEP, {"num_processes": 1}),
        (MPI, {"num_processes": 1}),
        (TORCHRUN, {"num_processes": 1}),
        (KUBEFLOW, {"num_processes": 1}),
        (STEP, {"num_processes": 1, "coordinator": "a:1", "process_id": 0}),
    ],
)
@pytest.mark.parametrize("installed", [(), ("kubernetes",)])
def test_alone(environment, fields, installed):
    assert plan(environment, 8, installed, **fields) is None
    assert plan(environment, 8, installed, engine="pmap", **fields) is None


VARIABLES = {name for one in (KUBEFLOW, POD, STEP, ARRAY, MPI4, TORCHRUN, HYDRA) for name in one}


@given(
    st.dictionaries(
        st.sampled_from(sorted(VARIABLES | {"http_proxy", "JOB_COMPLETION_INDEX"})),
        st.sampled_from(["0", "1", "2", "n[1-2]", "10.0.0.1:1234"]),
    )
)
def test_without_a_sign_the_environment_joins_nobody(environment):
    """So that `hosts.joined` need not ask."""
    assert {launcher.count for launcher in LAUNCHERS} <= set(SIGNS)
    assert plan({name: value for name, value in environment.items() if name not in SIGNS}, 8, ("kubernetes",)) is None


@pytest.mark.parametrize(
    ("environment", "installed", "fields", "joining"),
    [
        ({}, (), FLAGS, Joining("the flags", "10.0.0.1:1234", 2, 0)),
        (KUBEFLOW, (), FLAGS, Joining("the flags", "10.0.0.1:1234", 2, 0)),
        (KUBEFLOW, (), {}, Joining("JAX", "10.0.0.1:1234", 4, 3)),
        (KUBEFLOW | POD | {"JOB_COMPLETION_INDEX": "3"}, ("kubernetes",), {}, Joining("JAX", "10.0.0.1:1234", 4, 3)),
        (STEP, (), {}, Joining("Slurm", None, 2, 1, method="slurm")),
        (STEP | {"PMIX_RANK": "1"}, (), {}, Joining("Slurm", None, 2, 1, method="slurm")),
        (STEP | {"WORLD_SIZE": "2"}, (), {}, Joining("Slurm", None, 2, 1, method="slurm")),
        (STEP | ADDRESS, (), {}, Joining("Slurm", "10.0.0.1:1234", 2, 1)),
        (STEP, ("libtpu",), {}, Joining("Slurm", None, 2, 1, method="slurm")),
        (MPI4, (), {}, Joining("Open MPI", None, 2, 1, method="ompi")),
        (MPI4 | ARRAY, (), {}, Joining("Open MPI", None, 2, 1, method="ompi")),
        (MPI4 | {"WORLD_SIZE": "2", "RANK": "1"}, (), {}, Joining("Open MPI", None, 2, 1, method="ompi")),
        (MPI | ADDRESS, (), {}, Joining("Open MPI", "10.0.0.1:1234", 2, 1)),
        (TORCHRUN | ADDRESS, (), {}, Joining("torchrun", "10.0.0.1:1234", 2, 1)),
        (HYDRA | ADDRESS, (), {}, Joining("PMI", "10.0.0.1:1234", 2, 1)),
        ({}, ("libtpu",), {}, Joining("the TPU's metadata", may_be_alone=True)),
        (
            ADDRESS | POD | {"JOB_COMPLETION_INDEX": "3"},
            ("kubernetes",),
            {},
            Joining("Kubernetes", "10.0.0.1:1234", method="k8s"),
        ),
    ],
)
def test_joins(environment, installed, fields, joining):
    assert plan(environment, 0, installed, **fields) == joining


@pytest.mark.parametrize(
    ("environment", "field"),
    [
        (TORCHRUN, "coordinator"),
        (TORCHRUN | STEP | {"WORLD_SIZE": "4", "RANK": "3"}, "coordinator"),
        (MPI, "coordinator"),
        (HYDRA, "coordinator"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "coordinator"),
        (ADDRESS | {"JAX_NUM_PROCESSES": "2"}, "coordinator"),
        (ADDRESS | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "coordinator"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "n1"}, "coordinator"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "coordinator"),
        (STEP | {"WORLD_SIZE": "2", "RANK": "0"}, "coordinator"),
        (ADDRESS, "num_processes"),
        (ADDRESS | {"JAX_PROCESS_ID": "0"}, "num_processes"),
        (ADDRESS | POD | {"JOB_COMPLETION_INDEX": "3"}, "num_processes"),
        ({"PMIX_RANK": "0"}, "num_processes"),
        ({"PMI_RANK": "1"}, "num_processes"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE"),
        (KUBEFLOW | {"JAX_COORDINATOR_ADDRESS": "nowhere"}, "JAX_COORDINATOR_ADDRESS"),
        (KUBEFLOW | {"JAX_LOCAL_DEVICE_IDS": "all"}, "JAX_LOCAL_DEVICE_IDS"),
    ],
)
def test_stops(environment, field):
    with refused(field):
        plan(environment)


def test_flags_to_give_are_named():
    words = (
        "torchrun",
        "one of 2",
        "--coordinator HOST:PORT --num-processes 2 --process-id 1",
        "--num-processes 1 trains",
    )
    with refused("coordinator", *words):
        plan(TORCHRUN)


@pytest.mark.parametrize(("environment", "fields"), [({}, FLAGS), (STEP, {}), (MPI4, {}), (KUBEFLOW, {})])
def test_pmap_is_for_one_host(environment, fields):
    with refused("engine", "pmap", "--engine jit or fsdp", "--num-processes 1"):
        plan(environment, engine="pmap", **fields)


@pytest.mark.parametrize(
    ("environment", "gpus", "own"),
    [
        (STEP, 4, (0, 1, 2, 3)),  # one process on each of two machines: JAX takes GPU 0 alone
        (ONE_MACHINE, 2, (1,)),
        (ONE_MACHINE, 1, (0,)),  # --gpus-per-task=1: JAX takes 1
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "", "SLURM_STEP_NUM_NODES": "2"}, 4, (0, 1, 2, 3)),
        (STEP | {"SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "1,2(x2)", "SLURM_LOCALID": "0"}, 2, (0,)),
        (STEP | {"JAX_LOCAL_DEVICE_IDS": "2,3"}, 4, (2, 3)),
        (MPI4, 2, (1,)),
        (MPI4 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, 3, (0, 1, 2)),
        (TORCHRUN | ADDRESS, 2, (1,)),
        (KUBEFLOW, 8, tuple(range(8))),
        (ONE_MACHINE, 0, ()),
    ],
)
def test_gpus_of_a_process(environment, gpus, own):
    joining = plan(environment, gpus)
    assert joining is not None
    assert joining.local_device_ids == own


def test_flags_take_the_gpus_that_the_launcher_divides():
    joining = plan(ONE_MACHINE, 2, coordinator="a:1", num_processes=2, process_id=1)
    assert joining is not None
    assert joining.local_device_ids == (1,)
    alone_there = plan({}, 2, coordinator="a:1", num_processes=2, process_id=1)
    assert alone_there is not None
    assert alone_there.local_device_ids == (0, 1)


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        (ONE_MACHINE, 4),
        (ONE_MACHINE, 3),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": ""}, 2),
        (MPI4, 8),
    ],
)
def test_gpus_that_do_not_go_round_are_refused(environment, gpus):
    with refused("devices"):
        plan(environment, gpus)


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_a_proxy_is_named(variable):
    """Of the many spellings these are what gRPC reads; without the refusal it waits, and JAX aborts."""
    with refused(variable, variable, "http://p:1", "add 10.0.0.1 to no_proxy"):
        plan({variable: "http://p:1"}, **FLAGS)
    with refused(variable):
        plan({variable: "http://p:1"} | STEP)


@pytest.mark.parametrize(
    "environment",
    [
        {"http_proxy": "http://p:1", "no_proxy": "localhost, 10.0.0.1"},
        {"http_proxy": "http://p:1", "no_proxy": "10.0.0.0/8"},
        {"http_proxy": "http://p:1", "no_grpc_proxy": ".0.0.1"},
        {"HTTP_PROXY": "http://p:1"},
        {"all_proxy": "http://p:1"},
    ],
)
def test_a_proxy_that_is_not_asked_is_no_reason(environment):
    assert plan(environment, **FLAGS) is not None


@pytest.mark.parametrize("left_out", [{}, {"no_proxy": "10.0.0.2"}, {"no_proxy": "*"}, {"NO_PROXY": "10.0.0.1"}])
def test_what_does_not_leave_the_coordinator_out(left_out):
    with refused("http_proxy"):
        plan({"http_proxy": "http://p:1"} | left_out, **FLAGS)
