# Sourced by the other scripts: makes the virtual environment .venv and installs this checkout with the given extras.
#   source scripts/setup.sh [EXTRA,EXTRA]
# Runs again only when pyproject.toml, the pins or the extras have changed.

setup_venv() {
    local extras="$1" python wanted have
    if [ ! -x .venv/bin/python ]; then
        for python in python3 python3.13 python3.12 python3.11; do
            "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
            python=""
        done
        if [ -z "$python" ]; then
            echo "Python 3.11 or newer is needed; python3 is $(python3 --version 2>&1)" >&2
            return 1
        fi
        "$python" -m venv .venv
    fi
    # dev holds all that torch does, so an environment for tests serves the quickstart too.
    wanted="$(cat pyproject.toml scripts/constraints.txt | cksum)"
    for have in "$extras" dev; do
        if [ "$(cat ".venv/.installed.$have" 2>/dev/null)" = "$wanted" ]; then return; fi
    done
    echo "Installing into .venv ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e ".[$extras]"
    if [ "$extras" = dev ]; then
        # A peer in the tests. What it requires for its training loop and its cloud is not needed, and is large.
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt --no-deps \
            lightly lightly-utils
    fi
    echo "$wanted" >".venv/.installed.$extras"
}

setup_venv "$1"
