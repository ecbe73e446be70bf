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

# Names that a user imports from the top are looked up there when they are first used; the library names their homes.
FACADE = "mae_jax"

# Modules that import others by a name that is put together: the facade, and the command line, of its own commands.
BY_NAME = {FACADE, "mae_jax.cli.__main__", "parity"}


def modules() -> dict[str, Path]:
    """Every module by its dotted name; a package goes by its own."""
    files = [*ROOT.glob("mae_jax/**/*.py"), *ROOT.glob("parity/**/*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of this project that a file imports anywhere in it, functions and type checks included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            # Without `as`, `import mae_jax.rng` gives the name mae_jax.
            names += [alias.name.partition(".")[0] for alias in node.names if not alias.asname]
            yield from (name for name in names if name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}, line {node.lineno}: imports are absolute"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in inner if name in known)
            if node.module in known and any(name not in known for name in inner):
                yield node.module


def imports_by_name(file: Path) -> list[int]:
    """The lines in which a file calls `importlib.import_module` or `__import__`, whatever it imports by them."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__")
    ]


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


@pytest.mark.parametrize(
    ("line", "imported", "hidden"),
    [
        ("import mae_jax", {"mae_jax"}, []),
        ("import mae_jax.rng", {"mae_jax", "mae_jax.rng"}, []),
        ("import mae_jax.rng as rng", {"mae_jax.rng"}, []),
        ("from mae_jax import rng", {"mae_jax.rng"}, []),
        ("from mae_jax import load_torch, rng", {"mae_jax", "mae_jax.rng"}, []),
        ("from mae_jax.port.read import load_torch", {"mae_jax.port.read"}, []),
        ("def f():\n    from mae_jax import save_torch", {"mae_jax"}, []),
        ("importlib.import_module('mae_jax.port')", set(), [1]),
        ("import_module(name)", set(), [1]),
        ("x = 1\n__import__('mae_jax').load_torch", set(), [2]),
    ],
)
def test_what_an_import_is(line, imported, hidden, tmp_path):
    file = tmp_path / "module.py"
    file.write_text(line)
    assert set(imports(file, MODULES)) == imported
    assert imports_by_name(file) == hidden


@pytest.mark.parametrize("module", [name for name in MODULES if name not in BY_NAME])
def test_no_import_hides(module):
    """By a string, which the other tests do not read."""
    assert not imports_by_name(MODULES[module]), f"{module} imports by a string: write an import"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("mae_jax.")])
def test_the_library_does_not_use_its_facade(module):
    """`import mae_jax` gives names of all layers; `from mae_jax import rng` gives one module, of its own layer."""
    assert FACADE not in IMPORTS[module], f"{module} imports from the top of mae_jax: import from the module itself"


def test_no_import_goes_round():
    downwards = {name: [found for found in found_in if found != FACADE] for name, found_in in IMPORTS.items()}
    downwards["mae_jax.port.verify"] = [name for name in downwards["mae_jax.port.verify"] if layer(name) != "parity"]
    try:
        graphlib.TopologicalSorter(downwards).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"imports go round: {' -> '.join(error.args[1])}")
