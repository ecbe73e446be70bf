#!/usr/bin/env bash
# The tests once more on the newest Python that is found, with the JAX and NumPy that come with it, in .venv-newer.
# PyTorch is left out there, and what needs it skips. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
for python in python3.14 python3.13 python3.12 ~/.pyenv/versions/3.{14,13,12}.*/bin/python3; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
        source scripts/setup.sh test .venv-newer "$python"
        exec .venv-newer/bin/python -m pytest -n 3 --dist worksteal "$@"
    fi
done
echo "no Python of 3.12 or newer is found"
