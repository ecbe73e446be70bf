"""Settings with which programs compile in a third of the time; their arrays are tiny, so that this is what tests cost.

JAX reads them from the environment, which the processes that a test starts inherit. As users compile, which is with
every optimisation: the parity command (parity/test_stages.py), the probe of digits (integration/test_digits.py),
the programs of cli/test_process.py.
"""

import os
from collections.abc import Mapping
from importlib.metadata import version

DEVICES = "--xla_force_host_platform_device_count"
# One part for the compiler in place of 32; loops written by XLA's older way, which later versions have no flag for, and
# an unknown flag ends the process.
FLAGS = (
    "--xla_cpu_parallel_codegen_split_count=1",
    *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []),
)


def quick(devices: int, given: str = "") -> dict[str, str]:
    """Return the variables for a process with so many simulated devices, beside flags that are given."""
    flags = " ".join((given, *FLAGS, f"{DEVICES}={devices}"))
    return {"XLA_FLAGS": flags.strip(), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}


def as_users_compile() -> Mapping[str, str]:
    """Return this process's environment without them; other flags that it was given stay."""
    ours = {flag.partition("=")[0] for flag in (*FLAGS, DEVICES)}
    rest = [flag for flag in os.environ["XLA_FLAGS"].split() if flag.partition("=")[0] not in ours]
    plain = {name: value for name, value in os.environ.items() if name not in quick(1)}
    return plain | ({"XLA_FLAGS": " ".join(rest)} if rest else {})
