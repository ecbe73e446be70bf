"""Programs are kept between processes, and nothing fails where they cannot be."""

import os
import subprocess
import sys

import pytest

from tests.quick import as_users_compile

SCRIPT = """
import jax
from mae_jax.cli.compiled import keep_compiled
print(keep_compiled())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.jit(lambda x: x + 1)(41))
"""

TWO_BLOCKS = """
import jax
from mae_jax.cli.compiled import keep_compiled
print(keep_compiled())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
x = jax.numpy.ones((1024, 1024))
print(jax.jit(lambda x: ((x @ x) @ (x @ x.T) @ (x.T @ x)).sum() + ((x.T @ x) @ (x @ x.T)).sum())(x))
"""


def call(home, script=SCRIPT, **environment):
    """The lines that the script prints."""
    own = ("JAX_COMP", "JAX_ENABLE", "JAX_P")
    plain = {key: value for key, value in as_users_compile().items() if not key.startswith(own)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        env=plain | {"XDG_CACHE_HOME": str(home)} | environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_programs_are_kept_in_the_users_cache(tmp_path):
    folder, result = call(tmp_path)
    assert (result, os.path.dirname(folder)) == ("42", str(tmp_path / "mae_jax"))
    kept = sorted(os.listdir(folder))
    assert any(name.startswith("jit__lambda") for name in kept)
    assert call(tmp_path) == [folder, "42"]
    assert sorted(os.listdir(folder)) == kept


@pytest.mark.parametrize(
    "environment",
    [
        {"XDG_CACHE_HOME": "/dev/null"},
        {"XDG_CACHE_HOME": "/proc"},
        {"JAX_ENABLE_COMPILATION_CACHE": "false"},
    ],
)
def test_where_nothing_can_be_kept_nothing_is(tmp_path, environment):
    assert call(tmp_path, **environment) == ["None", "42"]
    assert not list(tmp_path.iterdir())


def test_jaxs_own_variable_says_where(tmp_path):
    assert call(tmp_path / "home", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own")) == [str(tmp_path / "own"), "42"]
    assert os.listdir(tmp_path) == ["own"]


def test_what_cannot_be_kept_is_no_matter(tmp_path):
    """A program with one block of memory is kept; with two it is not, and works."""
    one, two = tmp_path / "one", tmp_path / "two"
    flags = {"XLA_FLAGS": "--xla_multiheap_size_constraint_per_heap=5000000", "JAX_PLATFORMS": "cpu"}
    folders = [call(one, TWO_BLOCKS, JAX_PLATFORMS="cpu"), call(two, TWO_BLOCKS, **flags)]
    assert [result for _, result in folders] == [f"{1024.0**7 + 1024.0**5:.7e}"] * 2
    assert [any("jit__lambda" in name for name in os.listdir(folder)) for folder, _ in folders] == [True, False]
