# shellcheck shell=bash
# `start` and `restart`: bringing workers up, and saying so when they do not come up.

readonly LOGS_KEPT=3
readonly LOG_LINES_AFTER_DEATH=20
declare -A LOG_OFFSET=()

# Every worker that the counts ask for and the command line means.
wanted_workers() {
    local tier number
    for tier in "${TIERS[@]}"; do
        for ((number = 1; number <= ${COUNT[$tier]}; number++)); do
            if selected "$tier-$number"; then printf '%s\n' "$tier-$number"; fi
        done
    done
}

# A selection that the counts do not cover would silently do nothing.
require_wanted() {
    if [[ $SELECTION == *-* ]] && is_surplus "$SELECTION"; then
        wrong_usage "$(count_of "$SELECTION"), so there is no $SELECTION; raise it first"
    fi
}

is_surplus() { ((${1#*-} > ${COUNT[${1%-*}]})); }

# count_of NAME: the setting that its tier has, as WORKER_COUNT_HIGH=1.
count_of() {
    local tier=${1%-*}
    printf 'WORKER_COUNT_%s=%s' "${tier^^}" "${COUNT[$tier]}"
}

# What every worker would find missing is said once, before one is touched.
check_environment() {
    local output
    find_python
    if output=$("$PYTHON" "$START_WORKER" --check 2>&1); then
        grep '^warning' <<<"$output" >&2 || true
        return 0
    fi
    printf '%s\n' "$output" >&2
    return 1
}

command_start() {
    local name held=0
    local -a wanted missing=()
    require_wanted
    take_lock
    find_workers
    mapfile -t wanted < <(wanted_workers)
    for name in "${wanted[@]}"; do
        if runs "$name"; then
            if drains "$name"; then
                warn "$name still drains (pid ${WORKER_PID[$name]}); start again when it has ended"
                held=1
            else
                say "$name runs already (pid ${WORKER_PID[$name]})"
            fi
            keep_in_mind "$name"
        else
            if remembered "$name"; then explain_stale "$name"; fi
            missing+=("$name")
        fi
    done
    say_surplus
    if ((${#missing[@]} == 0)); then return "$held"; fi
    check_environment || die "nothing was started: the environment lacks what is said above"
    for name in "${missing[@]}"; do launch "$name"; done
    await_ready "${missing[@]}" || say_what_runs_and_fail
    return "$held"
}

# A worker whose pid file was lost gets a new one.
keep_in_mind() {
    if remembered "$1" && [[ $FILE_PID == "${WORKER_PID[$1]}" && $FILE_START == "${WORKER_START[$1]}" ]]; then
        return 0
    fi
    say "$1: its pid file was lost; it is written again"
    remember "$1" "${WORKER_PID[$1]}" "${WORKER_START[$1]}"
}

say_surplus() {
    local name
    for name in "${!WORKER_PID[@]}"; do
        if selected "$name" && is_surplus "$name"; then
            say "$name runs beyond $(count_of "$name"); end it with: manage_workers.sh stop $name"
        fi
    done
}

# launch NAME: a process of its own session, without this terminal, that survives this shell.
launch() {
    local name=$1 log pid
    log=$(log_file "$name")
    forget "$name"
    rotate "$log"
    LOG_OFFSET["$name"]=$(size_of "$log")
    # In the background of a script nobody leads a process group, so setsid does not fork: $! is the worker's pid. It
    # is in the worker's name too: two hosts, and a worker and its successor, are never taken for one another.
    (
        trap '' HUP
        exec setsid "$PYTHON" "$START_WORKER" --tier "${name%-*}" --name "$name-${HOSTNAME:-host}-$BASHPID" \
            --status-file "$(status_file "$name")"
    ) </dev/null >>"$log" 2>&1 9>&- &
    pid=$!
    WORKER_PID["$name"]=$pid
    WORKER_START["$name"]=0
    if proc_stat "$pid"; then WORKER_START["$name"]=$PROC_START; fi
    # Not before it has become the worker: until then its command line is this script's.
    while alive "$pid" "${WORKER_START[$name]}" && ! worker_name "$pid"; do sleep 0.02; done
    remember "$name" "$pid" "${WORKER_START[$name]}"
}

size_of() { stat -c %s "$1" 2>/dev/null || printf 0; }

rotate() {
    local number
    if (($(size_of "$1") <= LOG_MAX_BYTES)); then return 0; fi
    for ((number = LOGS_KEPT - 1; number >= 1; number--)); do
        if [[ -e $1.$number ]]; then mv -f "$1.$number" "$1.$((number + 1))"; fi
    done
    mv -f "$1" "$1.1"
}

# await_ready NAME…: until each has reported for the first time, has died, or the time is up; fails where one did not
# come up.
await_ready() {
    local deadline=$((SECONDS + START_TIMEOUT)) name failed=0
    local -a pending=("$@") still
    while ((${#pending[@]})); do
        still=()
        for name in "${pending[@]}"; do
            read_report "$name" "${WORKER_PID[$name]}"
            if ! alive "${WORKER_PID[$name]}" "${WORKER_START[$name]}"; then
                say_death "$name"
                failed=1
            elif [[ -n $R_STATE && $R_STATE != starting ]]; then
                say "$name started (pid ${WORKER_PID[$name]}, $R_STATE)"
            else
                still+=("$name")
            fi
        done
        pending=("${still[@]}")
        if ((${#pending[@]} && SECONDS >= deadline)); then
            for name in "${pending[@]}"; do
                warn "$name (pid ${WORKER_PID[$name]}) runs but has not reported within $START_TIMEOUT s: logs $name"
            done
            return 1
        fi
        if ((${#pending[@]})); then sleep 0.1; fi
    done
    return "$failed"
}

say_death() {
    warn "$1 died at start; the last lines of $(log_file "$1"):"
    { tail -c +"$((LOG_OFFSET[$1] + 1))" "$(log_file "$1")" | tail -n "$LOG_LINES_AFTER_DEATH" | sed 's/^/    /'; } >&2
}

say_what_runs_and_fail() {
    local -a running=()
    local name
    find_workers
    while read -r name; do
        if runs "$name"; then running+=("$name (pid ${WORKER_PID[$name]})"); fi
    done < <(known_workers)
    if ((${#running[@]})); then
        local list
        printf -v list '%s, ' "${running[@]}"
        die "not all came up; these run: ${list%, }"
    fi
    die "no worker runs"
}

# One after the other, so that a tier of two or more is never without a worker.
command_restart() {
    local name
    local -a names
    require_wanted_or_running
    take_lock
    find_workers
    mapfile -t names < <(
        {
            wanted_workers
            known_workers
        } | awk '!seen[$0]++'
    )
    say_surplus
    # The workers that run were able to start once; the ones after them may not be.
    check_environment || die "nothing was restarted: the environment lacks what is said above"
    for name in "${names[@]}"; do
        selected "$name" || continue
        if runs "$name"; then
            end_workers kill "$STOP_TIMEOUT" "$name" || die "$name could not be stopped; the others were not touched"
        elif remembered "$name"; then
            explain_stale "$name"
            # Beyond the counts nothing is brought back from the dead.
            if is_surplus "$name"; then
                forget "$name"
                continue
            fi
        fi
        launch "$name"
        await_ready "$name" || say_what_runs_and_fail
    done
}

require_wanted_or_running() {
    find_workers
    if [[ -z $SELECTION ]] || ! runs "$SELECTION"; then require_wanted; fi
}
