#!/usr/bin/env bash
# Makes a virtual environment: make_venv.sh PYTHON TARGET
#
# Debian ships Python without the part that `python -m venv` needs (ensurepip). As root that package is installed
# here, so that one `make` command is enough on a bare machine; any other user is told what to ask for.
set -euo pipefail

python=$1
target=$2

fail() {
    echo "setup: $*" >&2
    exit 1
}

command -v "$python" >/dev/null ||
    fail "'$python' was not found. Install Python 3.11 or newer, or name one: make setup PYTHON=/path/to/python3"

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
    fail "'$python' does not run. Name another interpreter: make setup PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "'$python' is Python $version; 3.11 or newer is needed. Name another: make setup PYTHON=/path/to/python3"

if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    package="python$version-venv"
    command -v apt-get >/dev/null ||
        fail "'$python' cannot make virtual environments (no ensurepip). Install that part of Python, then try again"
    [ "$(id -u)" -eq 0 ] ||
        fail "'$python' cannot make virtual environments. As root: apt-get install $package; then try again"
    echo "setup: installing $package (Debian's Python comes without venv)"
    apt-get update -qq >/dev/null || fail "apt-get update failed; see its messages above"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null ||
        fail "apt-get install $package failed; see its messages above"
fi

"$python" -m venv --clear "$target"
