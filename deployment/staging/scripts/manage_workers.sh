#!/usr/bin/env bash
# Runs the workers of this host: how many of each tier, where they are, how they end. See WORKER_DEPLOYMENT.md.
#
# Exit codes: 0 done, 1 something did not work (stderr says what), 2 wrong usage, 3 `status`: no worker runs.
set -euo pipefail

HERE=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
ROOT=$(cd "$HERE/../../.." && pwd)
readonly HERE ROOT
readonly TIERS=(high normal low)
readonly START_WORKER="$HERE/start_worker.py"

# shellcheck source=lib/processes.sh
source "$HERE/lib/processes.sh"
# shellcheck source=lib/report.sh
source "$HERE/lib/report.sh"
# shellcheck source=lib/starting.sh
source "$HERE/lib/starting.sh"
# shellcheck source=lib/stopping.sh
source "$HERE/lib/stopping.sh"

usage() {
    cat <<'TEXT'
usage: manage_workers.sh COMMAND [options]

  start   [TIER|NAME]                start the workers that do not run yet; the others are left alone
  stop    [TIER|NAME]                let them finish or hand back their jobs, then SIGKILL whoever still runs
  drain   [TIER|NAME] [--timeout S]  as stop, but nobody is killed; exit code 1 when some still run after S seconds
  restart [TIER|NAME]                one after the other, each waiting until the one before is at work
  status  [--json]                   exit code 0: all run, 1: some are dead or silent, 3: none runs
  logs    [TIER|NAME] [-f] [-n N]    the last N lines (50) of each log; -f follows
  help                               this text

TIER is high, normal or low; NAME is one worker: high-1, normal-2. Without either, all of them.

  WORKER_COUNT_HIGH, _NORMAL, _LOW   workers of each tier: 1, 2, 1
  TOOLFLEET_STATE_DIR                pid files, logs, status files: .run
  TOOLFLEET_PYTHON                   the interpreter: .venv/bin/python of the project, else python3
  TOOLFLEET_DRAIN_TIMEOUT            seconds a worker has to finish its jobs: 30
  WORKER_START_TIMEOUT               seconds until a worker must have reported for the first time: 30
  WORKER_KILL_MARGIN                 seconds after the drain timeout at which stop sends SIGKILL: 10
  WORKER_LOG_MAX_BYTES               a larger log is put aside at the next start, three are kept: 10485760

Relative paths count from the project's root. All other settings: deployment/staging/env.example.
TEXT
}

say() { printf '%s\n' "$*"; }
warn() { printf 'manage_workers.sh: %s\n' "$*" >&2; }
die() {
    warn "$1"
    exit 1
}
wrong_usage() {
    warn "$1"
    usage >&2
    exit 2
}

# whole_number VARIABLE DEFAULT LEAST MOST: its value, checked.
whole_number() {
    local value=${!1:-$2}
    if ! [[ $value =~ ^[0-9]{1,12}$ ]] || ((10#$value < $3 || 10#$value > $4)); then
        wrong_usage "$1 is '$value'; set it to a whole number from $3 to $4"
    fi
    printf '%d' "$((10#$value))"
}

# seconds VALUE NAME: rounded up to whole seconds.
seconds() {
    if ! [[ $1 =~ ^[0-9]{1,7}([.][0-9]+)?$ ]]; then
        wrong_usage "$2 is '$1'; set it to a number of seconds, such as 30"
    fi
    awk -v s="$1" 'BEGIN { printf "%d", (s > int(s)) ? int(s) + 1 : s }'
}

configure() {
    # One and the same place for every caller, whatever directory it stands in; so for the workers' relative paths.
    cd "$ROOT"
    # An assignment of its own each: set -e does not see a substitution that fails within `declare` or an array.
    local high normal low drain margin
    high=$(whole_number WORKER_COUNT_HIGH 1 0 99)
    normal=$(whole_number WORKER_COUNT_NORMAL 2 0 99)
    low=$(whole_number WORKER_COUNT_LOW 1 0 99)
    declare -gA COUNT=([high]=$high [normal]=$normal [low]=$low)
    START_TIMEOUT=$(whole_number WORKER_START_TIMEOUT 30 1 3600)
    LOG_MAX_BYTES=$(whole_number WORKER_LOG_MAX_BYTES 10485760 1 999999999999)
    margin=$(whole_number WORKER_KILL_MARGIN 10 0 3600)
    drain=$(seconds "${TOOLFLEET_DRAIN_TIMEOUT:-30}" TOOLFLEET_DRAIN_TIMEOUT)
    STOP_TIMEOUT=$((drain + margin))
    STATE_DIR=${TOOLFLEET_STATE_DIR:-.run}
    [[ $STATE_DIR == /* ]] || STATE_DIR=$ROOT/$STATE_DIR
    if ! mkdir -p "$STATE_DIR" 2>/dev/null || ! STATE_DIR=$(cd "$STATE_DIR" 2>/dev/null && pwd -P); then
        die "the state directory $STATE_DIR can't be made; set TOOLFLEET_STATE_DIR to one that this user may write"
    fi
    export TOOLFLEET_STATE_DIR=$STATE_DIR
    readonly COUNT START_TIMEOUT LOG_MAX_BYTES STOP_TIMEOUT STATE_DIR
}

# The interpreter of the workers, in PYTHON.
find_python() {
    if [[ -n ${TOOLFLEET_PYTHON:-} ]]; then
        PYTHON=$TOOLFLEET_PYTHON
    elif [[ -x $ROOT/.venv/bin/python ]]; then
        PYTHON=$ROOT/.venv/bin/python
    else
        PYTHON=python3
    fi
    command -v "$PYTHON" >/dev/null || die "there is no program '$PYTHON'; run 'make setup', or set TOOLFLEET_PYTHON"
}

# Two commands that change the fleet never run at once. Workers do not inherit the lock (starting.sh closes it).
take_lock() {
    { exec 9>"$STATE_DIR/.lock"; } 2>/dev/null || die "$STATE_DIR can't be written by this user; set TOOLFLEET_STATE_DIR"
    if ! flock -n 9; then
        say "waiting for another manage_workers.sh that is at work in $STATE_DIR"
        flock -w $((START_TIMEOUT + STOP_TIMEOUT)) 9 || die "the other one is still at work; nothing was done"
    fi
}

is_selection() { [[ $1 =~ ^(high|normal|low)(-[1-9][0-9]*)?$ ]]; }

# selected NAME: whether the command line's TIER or NAME means this worker.
selected() { [[ -z $SELECTION || $1 == "$SELECTION" || ${1%-*} == "$SELECTION" ]]; }

parse() {
    COMMAND=${1:-}
    [[ -n $COMMAND ]] || wrong_usage "say what to do"
    shift
    SELECTION='' AS_JSON='' FOLLOW='' LINES_SHOWN=50 DRAIN_TIMEOUT=''
    while (($#)); do
        case "$COMMAND $1" in
            *' -h' | *' --help') COMMAND=help ;;
            'status --json') AS_JSON=yes ;;
            'logs -f') FOLLOW=yes ;;
            'logs -n' | 'drain --timeout')
                (($# > 1)) || wrong_usage "$1 needs a number"
                if [[ $1 == -n ]]; then LINES_SHOWN=$2; else DRAIN_TIMEOUT=$2; fi
                shift
                ;;
            'drain --timeout='*) DRAIN_TIMEOUT=${1#*=} ;;
            status' '* | *' -'*) wrong_usage "$COMMAND has no option '$1'" ;;
            *)
                is_selection "$1" || wrong_usage "'$1' is neither a tier (${TIERS[*]}) nor a worker such as high-1"
                [[ -z $SELECTION ]] || wrong_usage "$COMMAND takes one tier or worker, not several"
                SELECTION=$1
                ;;
        esac
        shift
    done
    [[ $LINES_SHOWN =~ ^[0-9]{1,9}$ ]] || wrong_usage "-n is '$LINES_SHOWN'; give a number of lines"
    readonly SELECTION AS_JSON FOLLOW LINES_SHOWN
}

main() {
    parse "$@"
    case $COMMAND in
        help | -h | --help) usage ;;
        start | stop | drain | restart | status | logs)
            configure
            "command_$COMMAND"
            ;;
        *) wrong_usage "there is no command '$COMMAND'" ;;
    esac
}

main "$@"
