"""Before the first step: do all hosts run the same thing?"""

import dataclasses
import hashlib
import importlib.metadata
import json
import uuid
from pathlib import Path
from typing import Any

import mae_jax
from mae_jax.config import HostConfig, Run
from mae_jax.errors import StatedError
from mae_jax.hosts import Hosts
from mae_jax.storage.workdir import claim, config_to_dict, flatten

VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def code_version() -> dict[str, str]:
    """Versions of what computes, and a digest of this package's own source."""
    package = Path(mae_jax.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return {"mae_jax code": digest.hexdigest()[:12]} | {name: importlib.metadata.version(name) for name in VERSIONS}


def facts(config: Run, examples: int) -> dict[str, Any]:
    """What must be the same on all hosts."""
    own = {field.name for field in dataclasses.fields(HostConfig)}
    fields = {name: value for name, value in flatten(config_to_dict(config)).items() if name not in own}
    return fields | {"images": examples} | code_version()


def check_agreement(hosts: Hosts, config: Run, examples: int) -> None:
    """Compare what all hosts are about to run.

    Raises:
      StatedError: they differ; on every host, naming what and the values.
    """
    told = [json.loads(text) for text in hosts.gather("facts", json.dumps(facts(config, examples)))]
    names = sorted({name for one in told for name in one})
    rows = [(name, [one.get(name) for one in told]) for name in names]
    differing = [
        f"{name}: " + ", ".join(f"{value} on host {host}" for host, value in enumerate(values))
        for name, values in rows
        if any(value != values[0] for value in values)
    ]
    if differing:
        raise StatedError(f"the hosts do not run the same: {'; '.join(differing)}. Start all of them alike.")


def claim_together(hosts: Hosts, config: Run, examples: int | None = None) -> Path:
    """`claim` by the first host; the others must see what it wrote.

    Raises:
      StatedError: as `claim`; or the folder is not the same on all hosts.
    """
    workdir = Path(config.workdir).absolute()
    # A name of this start's own: config.json may be left on a disk that is not shared from a run before.
    sign = workdir / f".hosts-{hosts.gather('start', uuid.uuid4().hex)[0]}"
    if hosts.first:
        claim(config, examples)
        if hosts.count > 1:
            sign.touch()
    hosts.gather("claimed", "")
    seen = hosts.gather("seen", str(hosts.count == 1 or sign.exists()))
    if hosts.first:
        sign.unlink(missing_ok=True)
    blind = [str(host) for host, one in enumerate(seen) if one == "False"]
    if blind:
        raise StatedError(
            f"workdir {config.workdir} of host 0 is not what host {', '.join(blind)} sees under this name: "
            "give a --workdir on storage that all hosts share"
        )
    return workdir
