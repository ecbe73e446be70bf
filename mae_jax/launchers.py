"""Is this process alone, or one of several that a launcher has started, and how does it join them?

One decision, of the environment's variables, the installed packages and the GPUs that the process sees. JAX's own
detection of clusters is asked for host 0's address alone: it knows no torchrun, PMI or Open MPI 5, reads neither
JAX_NUM_PROCESSES nor JAX_PROCESS_ID, takes the shells of a Slurm job for a step, and gives each process the GPU of its
number on the machine, though it may be alone there or see a single one (jax #16788, #28194).
"""

import contextlib
import ctypes
import dataclasses
import ipaddress
import os
import re
from collections.abc import Container, Mapping

from mae_jax.config import Run
from mae_jax.errors import StatedError


@dataclasses.dataclass(frozen=True)
class Launcher:
    """The environment variables from which a process that something started as one of several knows which it is.

    local_count, local_index: the same among those on its machine. Where local_count lists the counts of all machines
    (2(x3),1 is 2, 2, 2 and 1), `machines` says how many those are, and `machine` which of them this one is.
    method: JAX's detection that finds host 0 from the variables `detected_by`.
    decides: its index holds, whatever another launcher of as many processes says.
    """

    name: str
    count: str
    index: str
    local_count: str = ""
    local_index: str = ""
    method: str | None = None
    detected_by: tuple[str, ...] = ()
    machines: str = ""
    machine: str = ""
    decides: bool = False


# The innermost first: a torchrun may be started by Slurm, not the other way round. A count of 1 decides nothing: what
# the next one started may be one of several. SLURM_NTASKS is the job's, and set in its shells too; a step is what runs.
LAUNCHERS = (
    Launcher("JAX", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", decides=True),
    Launcher("torchrun", "WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"),
    Launcher(
        "Open MPI",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "ompi",
        ("OMPI_MCA_orte_hnp_uri",),
    ),
    Launcher("PMI", "PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    Launcher(
        "Slurm",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_PROCID",
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_LOCALID",
        "slurm",
        ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
        machines="SLURM_STEP_NUM_NODES",
        machine="SLURM_NODEID",
    ),
)


@dataclasses.dataclass(frozen=True)
class Joining:
    """How this process joins the others; what is None, JAX finds out by `method` or, on a TPU, by the TPU's metadata.

    local_device_ids: the GPUs that this process uses, by number; none where it is to use all that it finds.
    may_be_alone: nothing says that there are others; JAX asks where it runs, without the coordinator.
    """

    by: str
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] = ()
    method: str | None = None
    may_be_alone: bool = False

    @property
    def name(self) -> str:
        """Name this host among the others, as far as that is known."""
        return "this host" if self.process_id is None else f"host {self.process_id} of {self.num_processes}"


def plan_joining(config: Run, environment: Mapping[str, str], installed: Container[str], gpus: int) -> Joining | None:
    """Decide whether a process is alone (None) or one of several, and how it joins them.

    In this order: the flags, the variables of the launchers in the order of LAUNCHERS, a TPU's metadata.
    JAX_COORDINATOR_ADDRESS goes before what is detected. One of several never trains alone but by num_processes 1.

    installed: names of packages; `libtpu` and `kubernetes` count. gpus: how many this process sees.

    Raises:
      StatedError: it is one of several and cannot join, or cannot use its GPUs, or the engine is for one host.
    """
    if 1 in (config.num_processes, _number(environment, "JAX_NUM_PROCESSES")):
        return None
    joining: Joining | None
    if config.num_processes is not None:
        joining = Joining("the flags", config.coordinator, config.num_processes, config.process_id)
    else:
        joining = _launched(environment) or _detected(environment, installed)
    if joining is None:
        return None
    if config.engine == "pmap" and joining.num_processes is not None:
        raise StatedError(
            f"engine pmap works on one host, and this is {joining.name} by {joining.by}: give --engine jit or fsdp, "
            "or --num-processes 1 to train alone",
            field="engine",
        )
    _check_proxy(joining, environment)
    return dataclasses.replace(joining, local_device_ids=_own_gpus(joining, environment, gpus))


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    if not value:
        return None
    if not re.fullmatch(r"\d{1,9}", value):
        raise StatedError(f"the variable {name} is {value!r}, not a number: correct or unset it", field=name)
    return int(value)


def _launched(environment: Mapping[str, str]) -> Joining | None:
    """Join by what a launcher has set, where it has started several processes.

    Raises:
      StatedError: it leaves open which process this is, or where host 0 is.
    """
    counts = {launcher: _number(environment, launcher.count) or 0 for launcher in LAUNCHERS}
    if max(counts.values()) < 2:
        _refuse_unknown_count(environment, any(counts.values()))
        return None
    count = next(count for count in counts.values() if count > 1)
    same = [launcher for launcher in LAUNCHERS if counts[launcher] == count]
    indices = {launcher: index for launcher in same if (index := _number(environment, launcher.index)) is not None}
    if not indices:
        raise _unjoinable(same[0], count, "N", f"{same[0].index} is not set")
    first, index = next(iter(indices.items()))
    if not first.decides and len(set(indices.values())) > 1:
        values = " and ".join(f"{launcher.index} {index}" for launcher, index in indices.items())
        raise _unjoinable(first, count, "N", f"its number is open: {values}")
    if index >= count:
        raise _unjoinable(first, count, "N", f"{first.index} {index} is not below that")
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if address:
        return Joining(first.name, _checked(address), count, index)
    for launcher in same:
        if launcher.method and all(environment.get(name) for name in launcher.detected_by):
            return Joining(launcher.name, None, count, index, method=launcher.method)
    raise _unjoinable(first, count, str(index), "no variable names a free port of host 0 for JAX")


def _refuse_unknown_count(environment: Mapping[str, str], alone: bool) -> None:
    """Stop a process that is numbered, among how many nothing says.

    Raises:
      StatedError: there is such a number; no launcher that has counted one process explains it.
    """
    name = next((name for name in ("JAX_PROCESS_ID", "PMI_RANK", "PMIX_RANK") if environment.get(name)), None)
    if name is not None and not alone:
        raise StatedError(
            f"{name} {environment[name]} makes this one process of several, and no variable says of how many: give "
            "--coordinator HOST:PORT, --num-processes, --process-id and --engine jit; --num-processes 1 trains alone",
            field="num_processes",
        )


def _unjoinable(launcher: Launcher, count: int, index: str, reason: str) -> StatedError:
    return StatedError(
        f"{launcher.name} has started this process as one of {count} ({launcher.count}), and {reason}: give "
        f"--coordinator HOST:PORT --num-processes {count} --process-id {index} --engine jit, with a free port of "
        "host 0, or set JAX_COORDINATOR_ADDRESS to HOST:PORT; --num-processes 1 trains alone",
        field="coordinator",
    )


def _checked(address: str) -> str:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise StatedError(
            f"the variable JAX_COORDINATOR_ADDRESS is {address!r}, not HOST:PORT: correct it, or give --coordinator",
            field="JAX_COORDINATOR_ADDRESS",
        )
    return address


def _detected(environment: Mapping[str, str], installed: Container[str]) -> Joining | None:
    """Join by what JAX finds out by itself where no launcher has left a count: on a TPU, or in a Kubernetes job.

    An indexed job runs independent tasks unless it names a coordinator.
    """
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if "libtpu" in installed:
        return Joining("the TPU's metadata", address, may_be_alone=True)
    known = [launcher.count for launcher in LAUNCHERS if environment.get(launcher.count)]
    if not address or known:
        return None
    in_job = all(environment.get(name) for name in ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"))
    if in_job and "kubernetes" in installed:
        return Joining("Kubernetes", _checked(address), method="k8s")
    raise StatedError(
        f"the variable JAX_COORDINATOR_ADDRESS is {address}, and JAX_NUM_PROCESSES and JAX_PROCESS_ID are not set: "
        f"set them, or give --coordinator {address} --num-processes and --process-id; --num-processes 1 trains alone",
        field="num_processes",
    )


def _check_proxy(joining: Joining, environment: Mapping[str, str]) -> None:
    """Refuse to look for the coordinator behind a proxy, where gRPC would and wait in vain.

    Raises:
      StatedError: the variable that names the proxy.
    """
    proxy = next((name for name in ("grpc_proxy", "https_proxy", "http_proxy") if environment.get(name)), None)
    if proxy is None or joining.may_be_alone:
        return
    left_out = environment.get("no_grpc_proxy", environment.get("no_proxy", ""))
    entries = [entry.strip().lower() for entry in left_out.split(",") if entry.strip()]
    if joining.coordinator is None:
        covered, host = bool(entries), "the address of host 0"
    else:
        host = joining.coordinator.rpartition(":")[0].strip("[]")
        covered = any(host.lower().endswith(entry) or _in_range(host, entry) for entry in entries)
    if not covered:
        raise StatedError(
            f"the variable {proxy} is {environment[proxy]}, and {joining.name} would look for the coordinator there: "
            f"add {host} to no_proxy (or to no_grpc_proxy), or unset {proxy}",
            field=proxy,
        )


def _in_range(host: str, entry: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False


def _own_gpus(joining: Joining, environment: Mapping[str, str], gpus: int) -> tuple[int, ...]:
    """Choose among the GPUs that a process sees: all where it is alone on its machine, else one for each process.

    Raises:
      StatedError: the processes of a machine and the GPUs that each sees do not match.
    """
    if given := environment.get("JAX_LOCAL_DEVICE_IDS"):
        if not re.fullmatch(r"\d+(,\d+)*", given):
            raise StatedError(
                f"the variable JAX_LOCAL_DEVICE_IDS is {given!r}, not numbers with commas between them",
                field="JAX_LOCAL_DEVICE_IDS",
            )
        return tuple(int(number) for number in given.split(","))
    launcher = next(
        (one for one in LAUNCHERS if one.local_index and _number(environment, one.count) == joining.num_processes), None
    )
    if launcher is None or gpus < 2:
        return tuple(range(gpus))
    processes, index = _processes_here(environment, launcher), _number(environment, launcher.local_index)
    if processes == 1:
        return tuple(range(gpus))
    if processes == gpus and index is not None and index < gpus:
        return (index,)
    raise StatedError(
        f"{processes or 'an unknown number of'} processes on this machine by {launcher.name}, each of which sees "
        f"{gpus} GPUs: start one process for each machine or for each GPU, or let each see one of its own "
        "(srun --gpus-per-task=1, or CUDA_VISIBLE_DEVICES), or name them in JAX_LOCAL_DEVICE_IDS",
        field="devices",
    )


def _processes_here(environment: Mapping[str, str], launcher: Launcher) -> int | None:
    """Read how many processes the launcher has started on this machine."""
    if not launcher.machine:
        return _number(environment, launcher.local_count)
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get(launcher.local_count, ""))
    machines = [int(tasks) for tasks, times in runs for _ in range(int(times or 1))]
    if not machines and (nodes := _number(environment, launcher.machines)):
        return int(environment[launcher.count]) // nodes
    machine = _number(environment, launcher.machine) or 0
    return machines[machine] if machine < len(machines) else None


def visible_gpus() -> int:
    """Count the GPUs that this process sees, before JAX opens them: it must be given their numbers when it joins."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return 0
    for library, start, ask in (
        ("libcuda.so.1", "cuInit", "cuDeviceGetCount"),
        ("libamdhip64.so", "hipInit", "hipGetDeviceCount"),
    ):
        with contextlib.suppress(OSError):
            driver, count = ctypes.CDLL(library), ctypes.c_int(0)
            if getattr(driver, start)(0) == 0 and getattr(driver, ask)(ctypes.byref(count)) == 0:
                return count.value
    return 0
