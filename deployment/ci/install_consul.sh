#!/usr/bin/env bash
# Installs the Consul agent where it is missing; the discovery tests need a real one.
#
# Debian 11 (bullseye) is the last release that carries Consul (1.8.7). Its archive is read through a package list
# of this run's own, in a temporary directory: the machine's apt sources, lists and pins stay as they are, so
# nothing but this one package can come from the older release, and a failure leaves nothing behind. The address
# and key of the archive are those that the machine's own sources name.
set -euo pipefail

readonly SUITE=bullseye

fail() {
    echo "consul: $*" >&2
    exit 1
}

if command -v consul >/dev/null; then
    version=$(consul version 2>&1) || fail "$(command -v consul) does not run: $version"
    echo "consul: ${version%%$'\n'*} is installed"
    exit 0
fi
command -v apt-get >/dev/null ||
    fail "not installed, and this is no Debian machine. Install a Consul agent by other means and put it on PATH"
[ "$(id -u)" -eq 0 ] || fail "not installed. Installing it needs root: sudo $0"

# The archive that serves this machine's own release, as "<uri> <key or ->". Both forms that apt knows are read:
# deb822 stanzas and one-line entries. A stanza of another distribution's or vendor's has no suite of that name.
release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
[ -n "$release" ] || fail "/etc/os-release names no release (VERSION_CODENAME), so the apt source cannot be derived"

deb822_source() {
    { cat /etc/apt/sources.list.d/*.sources 2>/dev/null || true; } | awk -v release="$release" '
        function flush() { if (found && uri != "" && !disabled) { print uri, (key == "" ? "-" : key); exit } }
        function reset() { uri = ""; key = ""; found = 0; disabled = 0 }
        BEGIN { reset() }
        /^[[:space:]]*$/ { flush(); reset(); next }
        /^#/ { next }
        tolower($1) == "uris:" { uri = $2 }
        tolower($1) == "signed-by:" && $2 ~ /^\// { key = $2 }
        tolower($1) == "enabled:" && tolower($2) == "no" { disabled = 1 }
        tolower($1) == "suites:" { for (i = 2; i <= NF; i++) if ($i == release) found = 1 }
        END { flush() }' | head -n 1
}

one_line_source() {
    { cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null || true; } | awk -v release="$release" '
        $1 != "deb" { next }
        {
            key = "-"
            line = $0
            sub(/^deb[[:space:]]+/, "", line)
            if (match(line, /^\[[^]]*\]/)) {
                options = substr(line, 2, RLENGTH - 2)
                line = substr(line, RLENGTH + 1)
                if (match(options, /signed-by=\/[^ ]+/)) key = substr(options, RSTART + 10, RLENGTH - 10)
            }
            split(line, field, /[[:space:]]+/)
            first = (field[1] == "") ? 2 : 1
            if (field[first + 1] == release) { print field[first], key; exit }
        }'
}

source=$(deb822_source)
[ -n "$source" ] || source=$(one_line_source)
[ -n "$source" ] || fail "no apt source for '$release' was found under /etc/apt; add one, then try again"
uri=${source% *}
key=${source##* }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/parts" "$work/deb"

options=""
[ "$key" = - ] || options="[signed-by=$key] "
echo "deb ${options}$uri $SUITE main" >"$work/sources.list"
apt_of_suite=(apt-get -qq
    -o "Dir::Etc::SourceList=$work/sources.list"
    -o "Dir::Etc::SourceParts=$work/parts"
    -o "Dir::State::Lists=$work/lists"
    -o "Dir::Cache=$work/cache"
    -o APT::Sandbox::User=root
    # The release is out of support: its lists no longer get a new expiry date. Their signature is still checked.
    -o Acquire::Check-Valid-Until=false)

echo "consul: installing it from Debian's $SUITE"
"${apt_of_suite[@]}" update ||
    fail "the package lists of '$SUITE' could not be read from this machine's Debian archive (see above)"
(cd "$work/deb" && "${apt_of_suite[@]}" download consul >/dev/null) ||
    fail "the package 'consul' could not be downloaded from '$SUITE' (see above)"

# Only the program is wanted. The package's own installation would also make a user and start an agent on the
# default ports at every boot.
dpkg-deb --extract "$work"/deb/consul_*.deb "$work/root"
install -m 755 "$work/root/usr/bin/consul" /usr/local/bin/consul
if ! version=$(/usr/local/bin/consul version 2>&1); then
    rm -f /usr/local/bin/consul
    fail "the program from '$SUITE' does not run on this machine: $version"
fi
echo "consul: ${version%%$'\n'*} is installed in /usr/local/bin"
