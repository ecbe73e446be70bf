"""A command whose standard streams are closed or full, and one whose docstrings are stripped."""

import subprocess
import sys

import pytest

from .conftest import ROOT


def shell(redirection: str, *words: str, options: str = "") -> subprocess.CompletedProcess[str]:
    """Run `mae-jax` under a shell that redirects its streams."""
    command = f"{sys.executable} {options} -W error -m mae_jax.cli {' '.join(words)} {redirection}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)


def test_help_without_docstrings() -> None:
    """`python -OO` strips them."""
    done = shell("", "--help", options="-OO")
    assert (done.returncode, done.stderr) == (0, "")
    assert "mae-jax COMMAND --help" in done.stdout


@pytest.mark.parametrize("redirection", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_refusal_without_a_standard_error(redirection: str) -> None:
    done = shell(redirection, "knn", "/nowhere")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_a_command_without_standard_streams(tmp_path) -> None:
    done = shell(">&- 2>&-", "inspect", "digits", f"--sheet={tmp_path}/sheet.png", "--workers=0")
    assert done.returncode == 0
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_output_that_cannot_be_written_fails(tmp_path) -> None:
    done = shell("> /dev/full", "inspect", "digits", f"--sheet={tmp_path}/sheet.png", "--workers=0")
    assert done.returncode == 1
    assert done.stderr == "mae-jax: standard output cannot be written: No space left on device\n"


def test_help_that_cannot_be_written_fails() -> None:
    done = shell("> /dev/full", "--help")
    assert done.returncode == 1
    assert done.stderr == "mae-jax: standard output cannot be written: No space left on device\n"
