"""Mistakes planted into the code: the table fits, each is tried as it should be, and those drawn here are noticed."""

import asyncio
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mae_jax.errors import StatedError

from .conftest import ROOT

pytest.importorskip("torch")

from parity.report import line


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("mutate")


# --- The table --------------------------------------------------------------------------------------------------------


def test_the_table_fits_the_code(mutate: ModuleType) -> None:
    table = mutate.load(mutate.TABLE, ROOT)
    assert list(mutate.faults(table, ROOT)) == []
    files = {mutation.file for mutation in table}
    for package in ("models", "train"):
        modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mae_jax" / package).glob("[!_]*.py")}
        assert modules <= files
    assert {"mae_jax/rng.py", "mae_jax/cubic.py", "mae_jax/port/keys.py"} <= files
    assert len(table) >= 160


MODULE = "x = 1  # one\ny = 1\nz = 3\n"


def entry(**changes: str) -> str:
    fields = {"id": "a", "file": "mae_jax/a.py", "find": "x = 1", "replace": "x = 2", "what": "w", "stage": "s"}
    return "".join(f"{name} = '''{value}'''\n" for name, value in (fields | changes).items() if value)


@pytest.fixture
def project(mutate: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Make a project of one module, mae_jax/a.py, with these entries in its table; its root."""

    def make(*entries: str) -> Path:
        for folder in ("mae_jax", "parity", "tests"):
            (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / "pyproject.toml").touch()
        (tmp_path / "mae_jax/a.py").write_text(MODULE)
        (tmp_path / "tests/test_a.py").touch()
        table = tmp_path / "table.toml"
        table.write_text("[tests]\n" + "".join(f"[[mutation]]\n{words}" for words in entries))
        monkeypatch.setattr(mutate, "ROOT", tmp_path)
        monkeypatch.setattr(mutate, "TABLE", table)
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"file": "mae_jax/b.py"}, "a: there is no mae_jax/b.py"),
        ({"find": "w = 1"}, "a: its text is found 0 times in mae_jax/a.py, not once: 'w = 1'"),
        ({"find": "= 1"}, "a: its text is found 2 times in mae_jax/a.py, not once: '= 1'"),
        ({"replace": "x = "}, "a: mae_jax/a.py does not compile with it: "),
        ({"find": "# one", "replace": "# two"}, "a: it changes no code"),
    ],
)
def test_what_does_not_fit_is_named(
    mutate: ModuleType, project: Callable[..., Path], changes: dict[str, str], fault: str | None
) -> None:
    root = project(entry(**changes))
    found = list(mutate.faults(mutate.load(mutate.TABLE, root), root))
    assert [line.startswith(fault or "") for line in found] == [True] * (fault is not None)


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ([entry(what="")], "a: .*'what'"),
        ([entry(where="here")], "a: .*'where'"),
        ([entry(file="")], "a: 'file'"),
        ([entry(), entry()], "a: 2 entries have this id"),
    ],
)
def test_wrong_entries_are_named(
    mutate: ModuleType, project: Callable[..., Path], entries: list[str], fault: str
) -> None:
    root = project(*entries)
    with pytest.raises(mutate.TableError, match=fault):
        mutate.load(mutate.TABLE, root)


def test_an_error_in_the_table_is_wrong_usage(
    mutate: ModuleType,
    project: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    project(entry(find="nothing"))
    monkeypatch.setattr(sys, "argv", ["mutate.py"])
    assert mutate.main() == 2
    assert capsys.readouterr().err.startswith("a: its text is found 0 times")


def test_tests_are_those_that_mirror_the_file_and_those_that_are_named(
    mutate: ModuleType, project: Callable[..., Path]
) -> None:
    root = project(entry())
    words = mutate.TABLE.read_text().replace("[tests]", "[tests]\n'mae_jax/a.py' = ['tests/b.py']") + "tests = ['c.py']"
    mutate.TABLE.write_text(words)
    (mutation,) = mutate.load(mutate.TABLE, root)
    assert mutation.tests == ("tests/test_a.py", "tests/b.py", "c.py")
    assert mutate.mirrored("mae_jax/models/mae.py", ROOT) == ["tests/models/test_mae.py"]
    assert mutate.mirrored("mae_jax/models/flops.py", ROOT) == ["tests/models/test_flops.py"]
    assert mutate.mirrored("mae_jax/models/none.py", ROOT) == []


def test_which_are_chosen(mutate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    table = [mutate.Mutation(str(i), f"f{i % 3}.py", "", "", "", ("tests",) if i == 8 else ("loss",)) for i in range(9)]

    def ids(**changes: Any) -> str:
        return "".join(mutation.id for mutation in mutate.chosen(table, mutate.Arguments(**changes)))

    assert ids() == "012345678"
    assert ids(only=("7", "2")) == "27"
    assert ids(parity_only=True) == "01234567"
    monkeypatch.setattr(mutate, "changed_files", {"main": {"f1.py"}}.__getitem__)
    assert ids(since="main") == "147"
    drawn = ids(draw=4, seed=3)
    assert len(drawn) == 4
    assert drawn == ids(draw=4, seed=3) != ids(draw=4, seed=4)
    table.pop(next(i for i in range(9) if str(i) not in drawn))  # another table has the same draw, or nearly
    assert ids(draw=4, seed=3) == drawn
    with pytest.raises(StatedError, match="--only 12"):
        ids(only=("12",))
    monkeypatch.undo()
    with pytest.raises(StatedError, match="--since no-such-commit"):
        mutate.changed_files("no-such-commit")


# --- What commands make of a mistake ----------------------------------------------------------------------------------


def departure(stage: str) -> str:
    """What parity prints where a stage departs."""
    rows = [("images", "5", "2.4e-16", "2.4e-16", "3.0e-14", "ok"), (stage, "9", "nan", "nan", "exact", "DEPARTS: x")]
    return "\n".join(
        [*map(line, rows), f"tiny: 1 of 14 tensors differ. The first stage that departs is {stage!r}, ..."]
    )


AGREES = line(("loss", "5", "2.4e-16", "2.4e-16", "3.0e-14", "ok")) + "\ntiny: all 5 tensors agree.\n"


class Commands:
    """Stand-ins for parity and pytest: what they were called with, and how they end."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.ends: dict[str, tuple[int | None, str]] = {}

    async def __call__(
        self, command: list[str], folder: Path, programs: Path, limit: float | None
    ) -> tuple[int | None, str]:
        kind, lines = command[2], (folder / "mae_jax/a.py").read_text().splitlines()
        planted = [line for line in lines if line not in MODULE.splitlines()]
        self.calls.append(" ".join([kind, *planted]))
        return self.ends[kind] if planted else (0, AGREES)


@pytest.fixture
def commands(mutate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Commands:
    stand_ins = Commands()
    monkeypatch.setattr(mutate, "call", stand_ins)
    return stand_ins


@pytest.fixture
def run(mutate: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["mutate.py", f"--out={tmp_path}/out.jsonl", *words])
        return mutate.main()

    return call


FAILED = (1, "....F\nFAILED tests/test_a.py::test_x - AssertionError\n1 failed")


@pytest.mark.parametrize(
    ("parity", "tests", "line", "right", "code"),
    [
        ((1, departure("loss")), FAILED, "parity at 'loss'; tests (tests/test_a.py::test_x)", "1 of 1, 100 %", 0),
        ((1, AGREES + departure("loss, all")), (0, ""), "parity at 'loss, all'", "1 of 1, 100 %", 0),
        ((1, departure("images")), (0, ""), "parity at 'images', not at loss", "0 of 1, 0 %", 0),
        ((1, "a\nOops"), (0, ""), "parity at \"traceback: ['Oops']\", not at loss", "0 of 1, 0 %", 0),
        ((None, ""), (0, ""), "parity at 'time-out', not at loss", "0 of 1, 0 %", 0),
        ((0, AGREES), (None, ""), "tests (time-out)", "0 of 0", 0),
        ((0, AGREES), (2, "ImportError"), "tests (traceback: ['ImportError'])", "0 of 0", 0),
        ((0, AGREES), (0, ""), "NOBODY", "0 of 0", 1),
    ],
)
def test_who_notices(
    project: Callable[..., Path],
    commands: Commands,
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    parity: Any,
    tests: Any,
    line: str,
    right: str,
    code: int,
) -> None:
    project(entry(stage="loss"))
    commands.ends = {"parity": parity, "pytest": tests}
    assert run() == code
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split(maxsplit=1) == ["a", line]
    assert printed[3] == f"at the stage where they belong, of those: {right}"
    assert printed[4:] == (["nobody noticed a"] if code else [])


def test_what_was_found_is_not_run_again(
    project: Callable[..., Path], commands: Commands, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    root = project(entry(stage="loss"))
    commands.ends = {"parity": (1, departure("loss")), "pytest": FAILED}
    planted = ["parity", "parity x = 2  # one", "pytest", "pytest x = 2  # one"]
    assert run("--parity-only") == 0
    assert commands.calls == planted[:2]
    once = capsys.readouterr().out
    assert run("--parity-only") == 0
    assert commands.calls == planted[:2]
    assert capsys.readouterr().out == once
    assert run() == 0
    assert commands.calls == planted
    # A stage by another name, and another mistake: only the latter is new.
    project(entry(stage="images"), entry(id="b", find="z = 3", replace="z = 4", stage="loss"))
    assert run("--parity-only") == 0
    assert commands.calls == [*planted, "parity z = 4"]
    assert "a " + " " * 43 + "parity at 'loss', not at images" in capsys.readouterr().out
    # Another test is no reason to run parity again, and other code is.
    (root / "tests/test_b.py").touch()
    assert run("--only=a") == 0
    assert commands.calls == [*planted, "parity z = 4", *planted[2:]]
    (root / "mae_jax/b.py").touch()
    assert run("--only=a", "--parity-only") == 0
    assert commands.calls == [*planted, "parity z = 4", *planted[2:], *planted[:2]]
    assert (root / "mae_jax/a.py").read_text() == MODULE


def test_code_that_parity_does_not_execute_is_the_tests(
    project: Callable[..., Path], commands: Commands, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    project(entry(stage="tests"))
    commands.ends = {"pytest": FAILED}
    assert run() == 0
    assert commands.calls == ["pytest", "pytest x = 2  # one"]
    assert "caught by parity, of those in code that it executes: 0 of 0\n" in capsys.readouterr().out


def test_a_stage_that_parity_does_not_have_is_named(
    project: Callable[..., Path], commands: Commands, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    project(entry(stage="losses"))
    commands.ends = {"parity": (1, departure("loss")), "pytest": (0, "")}
    assert run() == 0
    assert capsys.readouterr().err == "a: parity has no stage losses\n"


def test_the_project_as_it_is_may_be_left_out(
    project: Callable[..., Path], commands: Commands, run: Callable[..., int]
) -> None:
    project(entry(stage="loss"))
    commands.ends = {"parity": (1, departure("loss")), "pytest": (0, "")}
    assert run("--no-original") == 0
    assert commands.calls == ["parity x = 2  # one", "pytest x = 2  # one"]


def test_what_fails_without_a_mistake_catches_nothing(
    mutate: ModuleType, project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, run: Callable[..., int]
) -> None:
    async def call(*_: Any) -> tuple[int, str]:
        return 1, "FAILED tests/test_a.py::test_x"

    project(entry())
    monkeypatch.setattr(mutate, "call", call)
    with pytest.raises(StatedError, match="this fails without any mistake"):
        run()


@pytest.mark.parametrize("kind", ["parity", "pytest"])
def test_a_command_that_was_called_wrongly_catches_nothing(
    project: Callable[..., Path], commands: Commands, run: Callable[..., int], kind: str
) -> None:
    project(entry())
    commands.ends = {"parity": (0, AGREES), "pytest": (0, "")}
    commands.ends[kind] = (2, "unknown flag") if kind == "parity" else (5, "no tests ran")
    with pytest.raises(StatedError, match="unknown flag" if kind == "parity" else "hold no test"):
        run()


# --- Processes --------------------------------------------------------------------------------------------------------

HANG = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"


def alive(pid: int) -> bool:
    """Whether a process is there and not merely waited for."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture
def no_leftovers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder for temporary files, empty at the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def test_a_hang_ends_with_its_children(mutate: ModuleType, tmp_path: Path) -> None:
    script = HANG.replace("print(", "open('pid', 'w').write(str(").replace(".pid, flush=True)", ".pid))")
    done = asyncio.run(mutate.call([sys.executable, "-c", script], tmp_path, tmp_path, 5.0))
    assert done == (None, "")
    assert not alive(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_nothing(
    project: Callable[..., Path], no_leftovers: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Neither copies nor processes; the results that there are stay."""
    root = project(entry())
    (root / "parity/__main__.py").write_text(
        HANG.replace("print(", "open('pid', 'w').write(str(").replace(".pid, flush=True)", ".pid))")
    )
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import mutate; from pathlib import Path\n"
        f"mutate.ROOT, mutate.TABLE = Path({str(root)!r}), Path({str(root / 'table.toml')!r})\n"
        "from ended import ended; sys.exit(ended(mutate.main))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment)
    try:
        end, found = time.monotonic() + 60, []
        while not (found := [file for file in no_leftovers.glob("*/copy/pid") if file.read_text()]):
            assert time.monotonic() < end
            time.sleep(0.05)
        pid = int(found[0].read_text())
        process.send_signal(number)
        assert process.wait(30) == code
    finally:
        process.kill()
        process.wait()
    assert not alive(pid)


# --- The real commands ------------------------------------------------------------------------------------------------


def assert_all_are_noticed(tmp_path: Path, *words: str) -> None:
    command = [sys.executable, "scripts/mutate.py", f"--out={tmp_path}/out.jsonl", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_two_that_are_drawn_are_noticed(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    assert_all_are_noticed(tmp_path, "--seed=73", "--draw=2", "--no-original")


@pytest.mark.extended
def test_ten_that_are_drawn_are_noticed(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    assert_all_are_noticed(tmp_path, "--seed=1", "--draw=10")
