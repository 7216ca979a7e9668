# shellcheck shell=bash
# `stop` and `drain`: a worker that gets SIGTERM takes no more jobs, finishes those it has or hands them back within
# TOOLFLEET_DRAIN_TIMEOUT, and ends.

readonly PROGRESS_EVERY_S=5
# What SIGKILL ends is gone at once, unless the kernel holds it, in a disk that does not answer for instance.
readonly KILLED_WAIT_S=5

command_stop() {
    local -a names
    take_lock
    choose_running
    if ((${#names[@]} == 0)); then return 0; fi
    end_workers kill "$STOP_TIMEOUT" "${names[@]}"
}

command_drain() {
    local timeout=$STOP_TIMEOUT
    local -a names
    if [[ -n $DRAIN_TIMEOUT ]]; then timeout=$(seconds "$DRAIN_TIMEOUT" --timeout); fi
    take_lock
    choose_running
    # Whoever loses patience may `stop` meanwhile.
    flock -u 9
    if ((${#names[@]} == 0)); then return 0; fi
    end_workers wait "$timeout" "${names[@]}"
}

# Sets names of the caller to the selected workers that run; what the dead ones left is cleared away.
choose_running() {
    local name
    names=()
    find_workers
    while read -r name; do
        selected "$name" || continue
        if runs "$name"; then
            names+=("$name")
        elif remembered "$name"; then
            explain_stale "$name"
            forget "$name"
        fi
    done < <(known_workers)
    if ((${#names[@]} == 0)); then say "no worker runs${SELECTION:+ of $SELECTION}; there is nothing to stop"; fi
}

# end_workers kill|wait TIMEOUT NAME…: SIGTERM, then wait. At the deadline `kill` sends SIGKILL, `wait` fails.
end_workers() {
    local mode=$1 timeout=$2 name failed=0
    local -a pending
    shift 2
    trap 'warn "interrupted; the workers go on draining: see status"; exit 130' INT
    for name in "$@"; do tell_to_end "$name" || failed=1; done
    pending=("$@")
    await_end "$mode" "$timeout"
    if [[ $mode == kill ]]; then
        for name in "${pending[@]}"; do
            warn "$name (pid ${WORKER_PID[$name]}) has not ended within $timeout s: SIGKILL; its jobs come back by their leases"
            signal "$name" KILL || failed=1
        done
        await_end killed "$KILLED_WAIT_S"
    fi
    for name in "${pending[@]}"; do
        warn "$name (pid ${WORKER_PID[$name]}) still runs after $timeout s$(in_flight "$name")"
        failed=1
    done
    trap - INT
    return "$failed"
}

# A second SIGTERM would end a worker at once, with its jobs left to their leases.
tell_to_end() {
    if drains "$1"; then return 0; fi
    signal "$1" TERM || return 1
    remember "$1" "${WORKER_PID[$1]}" "${WORKER_START[$1]}" draining
}

# await_end MODE TIMEOUT: takes from `pending` of the caller whoever has ended, until none is left or the time is up.
await_end() {
    local deadline=$((SECONDS + $2)) said_at=$SECONDS said='' progress name
    local -a still
    while ((${#pending[@]})); do
        still=()
        progress=''
        for name in "${pending[@]}"; do
            if alive "${WORKER_PID[$name]}" "${WORKER_START[$name]}"; then
                still+=("$name")
                progress+=", $name$(in_flight "$name")"
            else
                say "$name stopped (pid ${WORKER_PID[$name]})"
                forget_ended "$name"
            fi
        done
        pending=("${still[@]}")
        if ((${#pending[@]} == 0 || SECONDS >= deadline)); then return 0; fi
        if [[ $progress != "$said" ]] || ((SECONDS - said_at >= PROGRESS_EVERY_S)); then
            say "waiting for ${progress#, }; $((deadline - SECONDS)) s left before $(after "$1")"
            said=$progress said_at=$SECONDS
        fi
        sleep 0.1
    done
}

# After SIGKILL (`killed`) there is nothing stronger to wait for.
after() { if [[ $1 == kill ]]; then printf 'SIGKILL'; else printf 'this gives up'; fi; }

in_flight() {
    read_report "$1" "${WORKER_PID[$1]}"
    if [[ -n $R_IN_FLIGHT ]]; then printf ' (%s in flight)' "$R_IN_FLIGHT"; fi
}
