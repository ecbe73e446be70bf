"""The layers of the project: every import goes down, lazy ones included, and none goes round."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the top to the bottom. A file imports from its own layer and from those below it.
LAYERS = (
    "parity",
    "mae_jax.cli",
    "mae_jax.bench",
    "mae_jax.runs",
    "mae_jax.evaluation",
    "mae_jax.port",
    "mae_jax.storage",
    "mae_jax.hosts",
    "mae_jax.joining",
    "mae_jax.launchers",
    "mae_jax.train",
    "mae_jax.data",
    "mae_jax.models",
    "mae_jax.presets",
    "mae_jax.config",
    "mae_jax.files",
    "mae_jax.cubic",
    "mae_jax.rng",
    "mae_jax.errors",
)

# A port is verified by the reference where the library that receives it is not installed.
EXCEPTIONS = {("mae_jax.port.verify", "parity")}

# Names that a user imports from the top are looked up there when they are first used.
FACADE = "mae_jax"


def modules() -> dict[str, Path]:
    """Every module by its dotted name; a package goes by its own."""
    files = [*ROOT.glob("mae_jax/**/*.py"), *ROOT.glob("parity/**/*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of this project that a file imports anywhere in it, functions and type checks included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}, line {node.lineno}: imports are absolute"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in inner if name in known)
            if node.module in known and any(name not in known for name in inner):
                yield node.module


def layer(module: str) -> str:
    """The layer that a module stands in."""
    return next((name for name in LAYERS if module == name or module.startswith(f"{name}.")), module)


MODULES = modules()
IMPORTS = {name: sorted(set(imports(file, MODULES))) for name, file in MODULES.items()}


def test_every_module_has_a_layer():
    assert {layer(name) for name in MODULES} == {*LAYERS, FACADE}


@pytest.mark.parametrize("module", [name for name in MODULES if name != FACADE])
def test_imports_only_go_down(module):
    place = LAYERS.index(layer(module))
    up = [
        found
        for found in IMPORTS[module]
        if found != FACADE and LAYERS.index(layer(found)) < place and (module, layer(found)) not in EXCEPTIONS
    ]
    assert not up, f"{module} imports {up}, which stand above it"


def test_no_import_goes_round():
    downwards = {name: [found for found in found_in if found != FACADE] for name, found_in in IMPORTS.items()}
    downwards["mae_jax.port.verify"] = [name for name in downwards["mae_jax.port.verify"] if layer(name) != "parity"]
    try:
        graphlib.TopologicalSorter(downwards).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"imports go round: {' -> '.join(error.args[1])}")
