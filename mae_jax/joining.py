"""How the hosts of a run meet, through jax.distributed, and what each says of those that do not come.

`jax.distributed.initialize` (JAX 0.10) aborts the process where not all hosts come in time, and crashes where its port
is in use. So the port is tried before, and each host waits for the first by a plain connection.
"""

import importlib.util
import os
import socket
import sys
import time

import jax

from mae_jax.config import Run
from mae_jax.errors import StatedError
from mae_jax.launchers import Joining, plan_joining, visible_gpus

START_WITHIN = 100  # seconds for all hosts to come
HEARTBEAT = 100  # seconds without a heartbeat after which a host is gone; one that is stopped for a minute is not

# What to look for where hosts do not meet.
WHAT = (
    "whether each was started with the same --coordinator and --num-processes and its own --process-id, and whether "
    "the port is open"
)


def join(config: Run) -> bool:
    """Meet the other hosts; False where this process is alone after all.

    Raises:
      StatedError: it is one of several and cannot join, or another has not come.
    """
    installed = {name for name in ("libtpu", "kubernetes") if importlib.util.find_spec(name)}
    joining = plan_joining(config, os.environ, installed, visible_gpus())
    if joining is None:
        return False
    if joining.coordinator is not None and joining.process_id is not None:
        if joining.process_id == 0:
            _check_port(joining.coordinator)
        else:
            _wait_for_first(joining, joining.coordinator)
    _report(
        f"{joining.name} joins by {joining.by}. If not all come within {START_WITHIN} s, JAX aborts: see then {WHAT}"
    )
    try:
        jax.distributed.initialize(
            joining.coordinator,
            joining.num_processes,
            joining.process_id,
            local_device_ids=list(joining.local_device_ids),
            cluster_detection_method=joining.method,
            initialization_timeout=START_WITHIN,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except ValueError:
        if not joining.may_be_alone:
            raise
        return False  # libtpu without a TPU
    except RuntimeError as error:
        raise StatedError(
            f"{joining.name} cannot join by {joining.by} ({str(error).partition(chr(10))[0]}): see {WHAT}",
            field="coordinator",
        ) from error
    return jax.process_count() > 1


def _check_port(coordinator: str) -> None:
    """Refuse a port that host 0 cannot listen on.

    Raises:
      StatedError: it is in use, or not allowed.
    """
    port = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", coordinator).rpartition(":")[2]
    try:
        # On all addresses, as JAX does. What is left there of connections that have ended does not count.
        socket.create_server(("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True).close()
    except OSError as error:
        raise StatedError(
            f"coordinator {coordinator}: host 0 cannot listen on port {port} ({error.strerror}): give another one to "
            "all hosts",
            field="coordinator",
        ) from error


def _wait_for_first(joining: Joining, coordinator: str) -> None:
    """Wait until host 0 listens, and say what is in the way as soon as it is.

    Raises:
      StatedError: it does not listen in time.
    """
    host, _, port = coordinator.rpartition(":")
    until, reason = time.monotonic() + START_WITHIN, ""
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > until:
                raise StatedError(
                    f"coordinator {coordinator} has not answered within {START_WITHIN} s ({error}): see {WHAT}",
                    field="coordinator",
                ) from error
            if str(error) != reason:
                reason = str(error)
                _report(f"{joining.name} waits up to {START_WITHIN} s for host 0 at {coordinator} ({reason})")
            time.sleep(0.5)
        else:
            return


def _report(text: str) -> None:
    print(f"mae-jax: {text}", file=sys.stderr, flush=True)
