"""Whether all hosts are about to run the same: configuration, images, code and the libraries that compute."""

import dataclasses
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from mae_jax.config import HostConfig, Run
from mae_jax.errors import StatedError
from mae_jax.files import parse_json
from mae_jax.hosts import Hosts
from mae_jax.storage.workdir import config_to_dict, flatten

VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")  # of what hosts must have the same


def code_version() -> dict[str, str]:
    """Give the versions of what computes, and a digest of this package's own source."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return {"mae_jax code": digest.hexdigest()[:12]} | {name: importlib.metadata.version(name) for name in VERSIONS}


def facts(config: Run, examples: int) -> dict[str, Any]:
    """Give what must be the same on all hosts."""
    own = {field.name for field in dataclasses.fields(HostConfig)}
    fields = {name: value for name, value in flatten(config_to_dict(config)).items() if name not in own}
    return fields | {"images": examples} | code_version()


def check_agreement(hosts: Hosts, config: Run, examples: int) -> None:
    """Compare what all hosts are about to run.

    Raises:
      StatedError: they differ; on every host, naming what and the values.
    """
    if hosts.count == 1:
        return
    answers = hosts.gather("facts", json.dumps(facts(config, examples)))
    rows = [parse_json(text.encode(), f"the answer of host {host}") for host, text in enumerate(answers)]
    columns = {name: [row.get(name) for row in rows] for name in sorted({name for row in rows for name in row})}
    differing = {name: values for name, values in columns.items() if any(value != values[0] for value in values)}
    if differing:
        words = "; ".join(
            f"{name}: " + ", ".join(f"{value} on host {host}" for host, value in enumerate(values))
            for name, values in differing.items()
        )
        raise StatedError(
            f"the hosts do not run the same: {words}. Start all of them alike.", field=next(iter(differing))
        )
