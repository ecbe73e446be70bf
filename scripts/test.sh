#!/usr/bin/env bash
# Format, lint, types and tests, with all that they need installed into .venv. Arguments go to pytest.
# Three tests run at once, since some wait; `-n 0` runs them in this process, one after another.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh dev
export PATH="$PWD/.venv/bin:$PATH"

ruff format --check .
ruff check .
mypy
exec python -m pytest -n 3 --dist worksteal "$@"
