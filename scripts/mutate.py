"""Plant single mistakes into mae_jax, one at a time, and see who notices: `python -m parity`, the tests, or nobody.

    python scripts/mutate.py                                # all of mutations.toml: hours on 2 cores
    python scripts/mutate.py --since main                   # those in files that differ from a commit
    python scripts/mutate.py --seed 1 --draw 10             # ten of them
    python scripts/mutate.py --only gelu-quick remat-forgotten
    python scripts/mutate.py --check                        # the table alone, in a second

Each mistake is planted into a copy of the project. There parity runs until the first stage that departs, and then the
tests that mirror the file, with those that the table adds. A mistake belongs to a stage, where parity ought to depart
first, or to `tests` where it is in code that parity does not execute; then only the tests run. Before all, the same is
run without a mistake, since what fails then would catch anything; --no-original leaves that out.

Results are added to --out, and what is there is not run again as long as neither the mistake nor the project changes.
Exits with 1 where nobody notices a mistake, and with 2 where the table does not fit the code.
"""

import ast
import asyncio
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from ended import ended

from mae_jax.errors import StatedError

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("mutations.toml")
COPIED = ("mae_jax", "parity", "tests", "pyproject.toml")
TESTS = ("tests",)  # the stage of mistakes in code that parity does not execute

# What parity prints: a stage and how many tensors it has, and the verdict.
ROW = re.compile(r"^(\S.*?) +\d+ +\S+ +\S+ +\S+   (?:ok|DEPARTS)", re.MULTILINE)
DEPARTED = re.compile(r"The first stage that departs is '([^']*)'")

# Seconds that each may take with a mistake, or twice what it took without any where that is more: a hang is a catch.
PARITY_LIMIT, TESTS_LIMIT = 300.0, 400.0

WRONG_USAGE = 2  # of parity, which is then not to be taken for a catch
NO_TESTS = 5  # pytest's, where a file holds none


@dataclass(frozen=True)
class Arguments:
    """Plant mistakes, one at a time, and see who notices."""

    only: tuple[str, ...] = ()
    """These alone, by id."""
    since: str | None = None
    """Those in files that differ from this commit."""
    seed: int = 0
    """Of --draw."""
    draw: int | None = None
    """So many of them, drawn by the seed."""
    jobs: int = 2
    """Mistakes that are tried at a time, each with a copy of its own."""
    out: Path = Path("mutate.jsonl")
    """Where results are kept, a line each."""
    parity_only: bool = False
    """No tests; mistakes in code that parity does not execute are left out."""
    original: bool = True
    """Before all, run the same without a mistake."""
    check: bool = False
    """Only look whether each text is found once, and what replaces it compiles."""


# --- The table --------------------------------------------------------------------------------------------------------


class TableError(Exception):
    """The table and the code do not fit; a line for each fault."""


@dataclass(frozen=True)
class Mutation:
    """A mistake: in `file`, `find`, which stands there once, becomes `replace`.

    stages: how the name of the stage where it belongs begins, as parity's report has it; several where each is right;
      or `tests`.
    tests: files that may notice, those that the table names for the whole file included.
    """

    id: str
    file: str
    find: str
    replace: str
    what: str
    stages: tuple[str, ...]
    tests: tuple[str, ...] = ()

    @property
    def executed(self) -> bool:
        """Return whether parity executes the code."""
        return self.stages != TESTS

    def planted(self, source: str) -> str:
        """Return the file's text with the mistake in it."""
        return source.replace(self.find, self.replace)


def load(table: Path, root: Path) -> list[Mutation]:
    """Read the table.

    Raises:
      TableError: it is no TOML, or an entry lacks a field, has an unknown one, or shares its id.
    """
    try:
        data = tomllib.loads(table.read_text())
    except tomllib.TOMLDecodeError as error:
        raise TableError(f"{table.name}: {error}") from error
    mutations, wrong = [], []
    for number, entry in enumerate(data["mutation"], 1):
        try:
            tests = (*mirrored(entry["file"], root), *data["tests"].get(entry["file"], ()), *entry.pop("tests", ()))
            stage = entry.pop("stage")
            stages = (stage,) if isinstance(stage, str) else tuple(stage)
            mutations.append(Mutation(**entry, stages=stages, tests=tuple(dict.fromkeys(tests))))
        except (KeyError, TypeError) as error:
            wrong.append(f"{entry.get('id', f'entry {number}')}: {error}")
    ids = [mutation.id for mutation in mutations]
    wrong += [f"{name}: {ids.count(name)} entries have this id" for name in dict.fromkeys(ids) if ids.count(name) > 1]
    if wrong:
        raise TableError("\n".join(wrong))
    return mutations


def mirrored(file: str, root: Path) -> list[str]:
    """Return the test file that mirrors a file, if there is one: tests/models/test_mae.py for mae_jax/models/mae.py."""
    path = Path(file)
    test = Path("tests", *path.parts[1:-1], f"test_{path.name}")
    return [test.as_posix()] if (root / test).exists() else []


def faults(mutations: Iterable[Mutation], root: Path) -> Iterator[str]:
    """Yield what is wrong with each entry, given the code in `root`."""
    for mutation in mutations:
        path = root / mutation.file
        if not path.exists():
            yield f"{mutation.id}: there is no {mutation.file}"
            continue
        source = path.read_text()
        if (count := source.count(mutation.find)) != 1:
            yield f"{mutation.id}: its text is found {count} times in {mutation.file}, not once: {mutation.find!r}"
            continue
        try:
            tree = ast.parse(mutation.planted(source))
            compile(tree, mutation.file, "exec")
        except SyntaxError as error:
            yield f"{mutation.id}: {mutation.file} does not compile with it: {error}"
            continue
        if ast.dump(tree) == ast.dump(ast.parse(source)):
            yield f"{mutation.id}: it changes no code"
        yield from (f"{mutation.id}: there is no {test}" for test in mutation.tests if not (root / test).exists())
        if not mutation.executed and not mutation.tests:
            yield f"{mutation.id}: it belongs to the tests, and none is named"


def chosen(mutations: Sequence[Mutation], arguments: Arguments) -> list[Mutation]:
    """Return the mistakes that are asked for.

    Raises:
      StatedError: an id is unknown, or git does not know the commit.
    """
    known = {mutation.id for mutation in mutations}
    if unknown := [name for name in arguments.only if name not in known]:
        raise StatedError(f"--only {' '.join(unknown)}: not in {TABLE.name}", field="only")
    found = [mutation for mutation in mutations if not arguments.only or mutation.id in arguments.only]
    if arguments.since is not None:
        files = changed_files(arguments.since)
        found = [mutation for mutation in found if mutation.file in files]
    if arguments.parity_only:
        found = [mutation for mutation in found if mutation.executed]
    if arguments.draw is not None:
        # By the hash of each, so that a draw hardly changes as the table grows.
        drawn = sorted(found, key=lambda mutation: digest(arguments.seed, mutation.id))[: arguments.draw]
        found = [mutation for mutation in found if mutation in drawn]
    return found


def changed_files(commit: str) -> set[str]:
    """List the files that differ from a commit.

    Raises:
      StatedError: git does not know it.
    """
    command = ["git", "diff", "--name-only", commit, "--"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StatedError(f"--since {commit}: {done.stderr.strip()}", field="since")
    return set(done.stdout.splitlines())


def digest(*parts: Any) -> str:
    """Return a short hash of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def source_digest(root: Path, names: Iterable[str]) -> str:
    """Return a hash of files and folders of the project."""
    named = (root / name for name in names)
    files = sorted(file for path in named for file in ([path] if path.is_file() else path.rglob("*")))
    kept = [file for file in files if file.is_file() and "__pycache__" not in file.parts]
    return digest([[str(file.relative_to(root)), hashlib.sha256(file.read_bytes()).hexdigest()] for file in kept])


# --- What one command makes of a mistake ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """Whether parity, or the tests, noticed; where: the stage or the test, or a traceback or `time-out`."""

    caught: bool
    where: str = ""
    seconds: float = 0.0
    stages: tuple[str, ...] = ()  # all that parity compared


@dataclass(frozen=True)
class Result:
    """What became of a mistake; None where parity, or the tests, did not run."""

    mutation: Mutation
    parity: Finding | None
    tests: Finding | None

    @property
    def caught(self) -> bool:
        return any(finding is not None and finding.caught for finding in (self.parity, self.tests))

    @property
    def right(self) -> bool:
        """Return whether parity departed where the mistake belongs."""
        return self.parity is not None and self.parity.caught and self.parity.where.startswith(self.mutation.stages)

    def __str__(self) -> str:
        words = []
        if self.parity is not None and self.parity.caught:
            words.append(
                f"parity at {self.parity.where!r}"
                + ("" if self.right else f", not at {' or '.join(self.mutation.stages)}")
            )
        if self.tests is not None and self.tests.caught:
            words.append(f"tests ({self.tests.where})")
        return f"{self.mutation.id:44} {'; '.join(words) or 'NOBODY'}"


async def call(command: Sequence[str], folder: Path, programs: Path, limit: float | None) -> tuple[int | None, str]:
    """Run a command in a copy, and return its exit code, None past the limit, and its output.

    It has a session of its own, so that its children end with it, on Ctrl-C too.
    """
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "OMP_NUM_THREADS": "1",  # tiny products are no work for two threads
    }
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(limit):
            output, _ = await process.communicate()
        return process.returncode, output.decode(errors="replace")
    except TimeoutError:
        return None, ""
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def run_parity(copy: Path, programs: Path, limit: float | None) -> Finding:
    """Run parity in a copy until the first stage that departs.

    Raises:
      StatedError: it does not understand how it is called.
    """
    begun = time.monotonic()
    command = [sys.executable, "-m", "parity", "--stop-at-first"]
    code, output = await call(command, copy, programs, limit)
    seconds = round(time.monotonic() - begun, 1)
    if code == WRONG_USAGE:
        raise StatedError(f"{' '.join(command)} ended with {code}: {output.strip()}", field="parity")
    if code is None:
        return Finding(True, "time-out", seconds)
    stages = tuple(dict.fromkeys(row[1] for row in ROW.finditer(output)))
    departed = DEPARTED.search(output)
    where = departed[1] if departed else traceback(output) if code else ""
    return Finding(bool(code), where, seconds, stages)


async def run_tests(tests: Sequence[str], copy: Path, programs: Path, limit: float | None) -> Finding:
    """Run tests in a copy until the first that fails.

    Raises:
      StatedError: the files hold none.
    """
    begun = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    code, output = await call(command, copy, programs, limit)
    seconds = round(time.monotonic() - begun, 1)
    if code == NO_TESTS:
        raise StatedError(f"{' '.join(tests)} hold no test", field="tests")
    if code is None:
        return Finding(True, "time-out", seconds)
    if code == 0:
        return Finding(False, seconds=seconds)
    failed = [line.split()[1] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return Finding(True, failed[0] if failed else traceback(output), seconds)


def traceback(output: str) -> str:
    """Return the last line of a command that ended with neither a departure nor a test that fails."""
    return f"traceback: {output.strip().splitlines()[-1:]}"


def copy_project(root: Path, copy: Path) -> None:
    """Copy what parity and the tests need."""
    copy.mkdir()
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(root / name, copy / name)


# --- All of them ------------------------------------------------------------------------------------------------------

Command = Callable[[Path, Path, float | None], Awaitable[Finding]]  # of a copy, compiled programs and seconds


class Findings:
    """What was found before, in a file with a line for each command, and what comes to it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        self._known = {
            line["key"]: Finding(**line["finding"] | {"stages": tuple(line["finding"]["stages"])}) for line in lines
        }

    def get(self, key: str) -> Finding | None:
        return self._known.get(key)

    def add(self, key: str, mutation: Mutation, command: str, finding: Finding) -> None:
        self._known[key] = finding
        line = {"id": mutation.id, "command": command, "key": key, "finding": asdict(finding)}
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Trial:
    """Mistakes tried a few at a time; each result is printed as it comes."""

    def __init__(self, arguments: Arguments, programs: Path) -> None:
        self._parity_only, self._programs = arguments.parity_only, programs
        self._findings, self._places = Findings(arguments.out), asyncio.Semaphore(arguments.jobs)
        # Tests may be added without a reason to run parity again.
        self._sources = {"parity": source_digest(ROOT, ("mae_jax", "parity")), "tests": source_digest(ROOT, COPIED)}

    async def results(self, mutations: Sequence[Mutation], original: Result | None = None) -> list[Result]:
        """Try all, in any order; the first error ends them.

        original: what was found without a mistake; None: these are it, and take as long as they take.
        """
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._result(mutation, original)) for mutation in mutations]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _result(self, mutation: Mutation, original: Result | None) -> Result:
        async with self._places:
            parity = tests = None
            if mutation.executed:
                limit = original and longest(PARITY_LIMIT, original.parity)
                parity = await self._finding(mutation, "parity", run_parity, limit)
            if mutation.tests and not self._parity_only:
                limit = original and longest(TESTS_LIMIT, original.tests)
                tests = await self._finding(mutation, "tests", partial(run_tests, mutation.tests), limit)
        result = Result(mutation, parity, tests)
        if original is not None:
            print(result, flush=True)
        return result

    async def _finding(self, mutation: Mutation, command: str, run: Command, limit: float | None) -> Finding:
        """Look up what a command finds, or plant the mistake into a new copy and run it there."""
        tests = mutation.tests if command == "tests" else ()
        key = digest(command, mutation.file, mutation.find, mutation.replace, tests, self._sources[command])
        if (known := self._findings.get(key)) is not None:
            return known
        with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
            copy = Path(folder) / "copy"
            copy_project(ROOT, copy)
            if mutation.file:
                path = copy / mutation.file
                path.write_text(mutation.planted(path.read_text()))
            found = await run(copy, self._programs, limit)
        self._findings.add(key, mutation, command, found)
        return found


def longest(limit: float, without: Finding | None) -> float:
    """Return the seconds that a command may take, given what it did without a mistake."""
    return max(limit, 2 * without.seconds if without else 0.0)


def no_mistake(mutations: Sequence[Mutation]) -> Mutation:
    """Make an entry that changes nothing, with all that is run for these mistakes."""
    tests = dict.fromkeys(test for mutation in mutations for test in mutation.tests)
    stages = ("",) if any(mutation.executed for mutation in mutations) else TESTS
    return Mutation("original", "", "", "", "nothing", stages, tuple(tests))


def score(results: Sequence[Result]) -> str:
    """State the shares caught: by anybody, by parity of what it executes, and of these at the right stage."""

    def share(what: str, part: int, whole: int) -> str:
        return f"{what}: {part} of {whole}" + (f", {100 * part / whole:.0f} %" if whole else "")

    executed = [result for result in results if result.mutation.executed]
    by_parity = [result for result in executed if result.parity is not None and result.parity.caught]
    lines = [
        share("caught by parity or tests", sum(result.caught for result in results), len(results)),
        share("caught by parity, of those in code that it executes", len(by_parity), len(executed)),
        share("at the stage where they belong, of those", sum(result.right for result in by_parity), len(by_parity)),
    ]
    return "\n".join(lines + [f"nobody noticed {result.mutation.id}" for result in results if not result.caught])


def unknown_stages(mutations: Sequence[Mutation], stages: Sequence[str]) -> list[str]:
    """List the entries none of whose stages begins one of parity's, given all of them."""
    return [
        f"{mutation.id}: parity has no stage {' or '.join(mutation.stages)}"
        for mutation in mutations
        if mutation.executed and not any(stage.startswith(mutation.stages) for stage in stages)
    ]


async def try_all(mutations: Sequence[Mutation], arguments: Arguments) -> list[Result]:
    """Try the project as it is, and then with each mistake.

    Raises:
      StatedError: something fails without a mistake.
    """
    with tempfile.TemporaryDirectory(prefix="mutate-") as programs:
        trial = Trial(arguments, Path(programs))
        original = Result(no_mistake(mutations), None, None)
        if arguments.original:
            (original,) = await trial.results([original.mutation])
        if original.caught:
            raise StatedError(f"this fails without any mistake: {original}", field="original")
        for line in unknown_stages(mutations, original.parity.stages) if original.parity is not None else ():
            print(line, file=sys.stderr)
        return await trial.results(mutations, original)


def main() -> int:
    """Return 0 where every mistake is noticed, 1 where one is not, 2 where the table does not fit the code."""
    arguments = tyro.cli(Arguments)
    try:
        table = load(TABLE, ROOT)
        mutations = chosen(table, arguments)
        if wrong := list(faults(mutations, ROOT)):
            raise TableError("\n".join(wrong))
        if arguments.check:
            print(f"{len(mutations)} mistakes, each of which can be planted")
            return 0
        results = asyncio.run(try_all(mutations, arguments))
    except TableError as error:
        print(error, file=sys.stderr)
        return WRONG_USAGE
    print(score(results))
    return int(not all(result.caught for result in results))


if __name__ == "__main__":
    sys.exit(ended(main))
