"""Settings with which programs compile in a third of the time; their arrays are tiny, so that this is what tests cost.

JAX reads them from the environment, which the processes that a test starts inherit.
"""

import os
from collections.abc import Mapping

# One part for the compiler in place of 32; loops written by XLA's older way of writing them.
FLAGS = ("--xla_cpu_parallel_codegen_split_count=1", "--xla_cpu_use_fusion_emitters=false")


def quick(devices: int, given: str = "") -> dict[str, str]:
    """The settings, for a process with so many simulated devices, beside flags that are given."""
    flags = " ".join((given, *FLAGS, f"--xla_force_host_platform_device_count={devices}"))
    return {"XLA_FLAGS": flags.strip(), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}


def as_users_compile() -> Mapping[str, str]:
    """This process's environment without them."""
    return {name: value for name, value in os.environ.items() if name not in quick(1)}
