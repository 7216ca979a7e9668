#!/usr/bin/env bash
# Installs libfaketime where it is missing; the tests of clock faults move the clock of single processes with it.
set -euo pipefail

readonly LIBRARY='/usr/lib/*/faketime/libfaketimeMT.so.1'

fail() {
    echo "libfaketime: $*" >&2
    exit 1
}

if compgen -G "$LIBRARY" >/dev/null; then
    echo "libfaketime: $(compgen -G "$LIBRARY") is installed"
    exit 0
fi
command -v apt-get >/dev/null ||
    fail "not installed, and this is no Debian machine. Install libfaketime by other means"
[ "$(id -u)" -eq 0 ] || fail "not installed. Installing it needs root: sudo $0"

install=(apt-get -qq install --yes --no-install-recommends libfaketime)
echo "libfaketime: installing it from Debian"
export DEBIAN_FRONTEND=noninteractive
# A machine that was just made may have no package lists, or old ones.
"${install[@]}" >/dev/null 2>&1 || { apt-get -qq update && "${install[@]}" >/dev/null; } ||
    fail "the package 'libfaketime' could not be installed (see above)"
compgen -G "$LIBRARY" >/dev/null || fail "the package 'libfaketime' is installed and holds no $LIBRARY"
echo "libfaketime: $(compgen -G "$LIBRARY") is installed"
