# shellcheck shell=bash
# Which processes are this fleet's workers. The truth is /proc: a worker is the process that was started with
# `--status-file <its own file in the state directory>`. A pid file remembers pid and start time, and is never
# believed alone: a pid that was given to another program, or to nobody, must not be signalled or counted.

# shellcheck disable=SC2153  # STATE_DIR is set by manage_workers.sh
pid_file() { printf '%s/%s.pid' "$STATE_DIR" "$1"; }
status_file() { printf '%s/%s.status.json' "$STATE_DIR" "$1"; }
log_file() { printf '%s/%s.log' "$STATE_DIR" "$1"; }

declare -A WORKER_PID=() WORKER_START=()

# slurp FILE: sets CONTENT to what is in it, empty where it can't be read. Not `$(<FILE)`: bash 5.2 leaves a script
# with `set -e` where that fails, even behind `||`, and files of processes go away at any time.
slurp() {
    CONTENT=''
    { IFS= read -r -d '' CONTENT <"$1" || true; } 2>/dev/null
}

# proc_stat PID: sets PROC_SESSION and PROC_START (clock ticks after boot); fails where no live process has this pid.
proc_stat() {
    local -a fields
    slurp "/proc/$1/stat"
    [[ -n $CONTENT ]] || return 1
    # The second field is the program's name in parentheses and may contain anything; the rest is numbers (proc(5)).
    read -ra fields <<<"${CONTENT##*) }"
    [[ ${fields[0]} != [ZX] ]] || return 1
    PROC_SESSION=${fields[3]}
    PROC_START=${fields[19]}
}

# alive PID START: whether this very process still lives.
alive() { proc_stat "$1" && [[ $PROC_START == "$2" ]]; }

# worker_name PID: sets NAME to the worker that this process is; fails where it is none of this state directory's.
worker_name() {
    local -a words
    local word previous=''
    { mapfile -d '' -t words <"/proc/$1/cmdline"; } 2>/dev/null || return 1
    for word in "${words[@]}"; do
        if [[ $previous == --status-file && $word == "$STATE_DIR"/*.status.json ]]; then
            NAME=${word##*/}
            NAME=${NAME%.status.json}
            is_selection "$NAME" && return 0
        fi
        previous=$word
    done
    return 1
}

# remembered NAME: sets FILE_PID, FILE_START and FILE_TOLD from the pid file; fails where there is none.
remembered() {
    FILE_PID='' FILE_START='' FILE_TOLD=''
    { read -r -d '' FILE_PID FILE_START FILE_TOLD <"$(pid_file "$1")" || true; } 2>/dev/null
    [[ $FILE_PID =~ ^[0-9]+$ ]]
}

# Fills WORKER_PID and WORKER_START with the workers that run.
find_workers() {
    local file pid
    WORKER_PID=() WORKER_START=()
    for file in "$STATE_DIR"/*.pid; do
        NAME=${file##*/}
        NAME=${NAME%.pid}
        local expected=$NAME
        if remembered "$NAME" && alive "$FILE_PID" "$FILE_START" && worker_name "$FILE_PID" &&
            [[ $NAME == "$expected" ]]; then
            WORKER_PID[$NAME]=$FILE_PID
            WORKER_START[$NAME]=$FILE_START
        fi
    done
    # Workers whose pid file was lost: a second one of their name must not be started beside them. The pattern comes
    # from a descriptor, since grep would find itself by an argument.
    while IFS= read -r file; do
        pid=${file#/proc/}
        pid=${pid%/cmdline}
        if worker_name "$pid" && [[ -z ${WORKER_PID[$NAME]:-} ]] && proc_stat "$pid" && leads_here "$pid"; then
            WORKER_PID[$NAME]=$pid
            WORKER_START[$NAME]=$PROC_START
        fi
    done < <(grep -lzFs -f <(printf '%s/\n' "$STATE_DIR") /proc/[0-9]*/cmdline || true)
}

# A worker leads its session, its children that have not become another program yet do not. A container's processes
# are seen from its host and may have the same paths; their root directory is another one.
leads_here() { [[ $PROC_SESSION == "$1" && "/proc/$1/root" -ef / ]]; }

runs() { [[ -n ${WORKER_PID[$1]:-} ]]; }

# What a pid file without its worker means, for people.
explain_stale() {
    if proc_stat "$FILE_PID"; then
        slurp "/proc/$FILE_PID/comm"
        say "$1: its pid file names $FILE_PID, which is another program now (${CONTENT%$'\n'}); it is left alone"
    else
        say "$1: its pid file names $FILE_PID, which is gone: it died without being stopped"
    fi
}

# remember NAME PID START [TOLD]: the pid file, a line each; TOLD is `draining` once it was told to end.
remember() { printf '%s\n' "${@:2}" >"$(pid_file "$1")"; }

forget() { rm -f "$(pid_file "$1")" "$(status_file "$1")" "$STATE_DIR/$1.status.new"; }

# forget_ended NAME: unless a successor was started meanwhile.
forget_ended() {
    if ! remembered "$1" || [[ $FILE_PID == "${WORKER_PID[$1]}" ]]; then forget "$1"; fi
}

# Every worker that runs or has a pid file, by tier and number.
known_workers() {
    local file tier name
    local -A known=()
    for name in "${!WORKER_PID[@]}"; do known[$name]=1; done
    for file in "$STATE_DIR"/*.pid; do
        name=${file##*/}
        name=${name%.pid}
        if is_selection "$name" && [[ $name == *-* && -e $file ]]; then known[$name]=1; fi
    done
    for tier in "${TIERS[@]}"; do
        for name in "${!known[@]}"; do
            if [[ ${name%-*} == "$tier" ]]; then printf '%s\n' "$name"; fi
        done | sort -t- -k2n
    done
}

# drains NAME: whether this worker was told to end, by this script or by somebody else.
drains() {
    if remembered "$1" && [[ $FILE_PID == "${WORKER_PID[$1]}" && $FILE_TOLD == draining ]]; then return 0; fi
    read_report "$1" "${WORKER_PID[$1]}"
    [[ $R_STATE == draining ]]
}

# signal NAME SIGNAL: to this very process, or to nobody.
signal() {
    alive "${WORKER_PID[$1]}" "${WORKER_START[$1]}" || return 0
    if ! kill -s "$2" "${WORKER_PID[$1]}" 2>/dev/null && alive "${WORKER_PID[$1]}" "${WORKER_START[$1]}"; then
        warn "$1 (pid ${WORKER_PID[$1]}) belongs to another user; run this as that user"
        return 1
    fi
}
