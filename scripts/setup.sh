# Sourced by the other scripts: makes a virtual environment and installs this checkout there with the given extras.
#   source scripts/setup.sh EXTRA[,EXTRA] [FOLDER [PYTHON]]      # .venv, of the first Python that is new enough
# Runs again only when pyproject.toml, the pins or the extras have changed.

setup_venv() {
    local extras="$1" folder="${2:-.venv}" python="${3:-}" wanted have
    if [ ! -x "$folder/bin/python" ]; then
        if [ -z "$python" ]; then
            for python in python3 python3.14 python3.13 python3.12 python3.11; do
                "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
                python=""
            done
        fi
        if [ -z "$python" ]; then
            echo "Python 3.11 or newer is needed; python3 is $(python3 --version 2>&1)" >&2
            return 1
        fi
        "$python" -m venv "$folder"
    fi
    # dev holds all that torch and test do, so an environment for tests serves the quickstart too.
    wanted="$(cat pyproject.toml scripts/constraints.txt | cksum)"
    for have in "$extras" dev; do
        if [ "$(cat "$folder/.installed.$have" 2>/dev/null)" = "$wanted" ]; then return; fi
    done
    echo "Installing into $folder ..."
    set -- "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt
    "$@" -e ".[$extras]"
    if [ "$extras" = dev ]; then
        # A peer in the tests. What it requires for its training loop and its cloud is not needed, and is large.
        "$@" --no-deps lightly lightly-utils
    fi
    echo "$wanted" >"$folder/.installed.$extras"
}

setup_venv "$@"
