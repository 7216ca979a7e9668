# shellcheck shell=bash
# `status` and `logs`: what the workers of this host say of themselves.

readonly STALE_AFTER_S=15
# A worker writes its status file every 3 s (worker_report.py); after five missed ones it hangs or is stopped.

# read_report NAME: sets R_* from the status file, empty where it is missing or of another process than PID.
read_report() {
    R_STATE='' R_ID='' R_IN_FLIGHT='' R_DONE='' R_SLOTS='' R_HEARTBEAT=''
    slurp "$(status_file "$1")"
    local json=$CONTENT
    [[ $json =~ \"pid\":\ ([0-9]+) && ${BASH_REMATCH[1]} == "$2" ]] || return 0
    if [[ $json =~ \"worker\":\ \"([^\"\\]*)\" ]]; then R_ID=${BASH_REMATCH[1]}; fi
    if [[ $json =~ \"state\":\ \"([^\"\\]*)\" ]]; then R_STATE=${BASH_REMATCH[1]}; fi
    if [[ $json =~ \"in_flight\":\ ([0-9]+) ]]; then R_IN_FLIGHT=${BASH_REMATCH[1]}; fi
    if [[ $json =~ \"done\":\ ([0-9]+) ]]; then R_DONE=${BASH_REMATCH[1]}; fi
    if [[ $json =~ \"slots\":\ ([0-9]+) ]]; then R_SLOTS=${BASH_REMATCH[1]}; fi
    if [[ $json =~ \"heartbeat_at\":\ ([0-9]+) ]]; then R_HEARTBEAT=${BASH_REMATCH[1]}; fi
}

# describe NAME: sets W_* for one worker: pid, state, uptime and heartbeat age in seconds (empty where unknown).
describe() {
    local now_ms=$((${EPOCHREALTIME/[.,]/} / 1000)) up
    W_PID='' W_UPTIME='' W_AGE='' W_STALE=false W_RUNS=false
    if runs "$1"; then
        W_PID=${WORKER_PID[$1]} W_RUNS=true
        read -r up _ </proc/uptime
        W_UPTIME=$((${up%.*} - WORKER_START[$1] / $(getconf CLK_TCK)))
    elif remembered "$1"; then
        W_PID=$FILE_PID
    fi
    read_report "$1" "$W_PID"
    if [[ -n $R_HEARTBEAT ]]; then W_AGE=$(((now_ms - R_HEARTBEAT) / 1000)); fi
    if [[ $W_RUNS == false ]]; then
        W_STATE=dead
        if [[ $R_STATE == stopped ]]; then W_STATE=stopped; fi
        R_IN_FLIGHT=''
    else
        W_STATE=${R_STATE:-starting}
        # It says so itself with its next heartbeat.
        if drains "$1"; then W_STATE=draining; fi
        if ((${W_AGE:-$W_UPTIME} > STALE_AFTER_S)); then W_STALE=true; fi
    fi
}

command_status() {
    local name running=0 troubled=0
    local -a names rows=() hints=()
    find_workers
    mapfile -t names < <(known_workers)
    for name in "${names[@]}"; do
        describe "$name"
        if [[ $W_RUNS == true ]]; then running=$((running + 1)); fi
        if [[ $W_RUNS == false || $W_STALE == true ]]; then
            troubled=$((troubled + 1))
            hints+=("$(worker_hint "$name")")
        fi
        if [[ -n $AS_JSON ]]; then rows+=("$(worker_json "$name")"); else rows+=("$(worker_row "$name")"); fi
    done
    if [[ -n $AS_JSON ]]; then
        local IFS=,
        printf '{"workers":[%s],"running":%d,"known":%d}\n' "${rows[*]}" "$running" "${#names[@]}"
    elif ((${#names[@]})); then
        printf '%-7s %-10s %8s %10s %9s %8s  %-22s %s\n' TIER NAME PID UPTIME IN-FLIGHT DONE STATE HEARTBEAT
        printf '%s\n' "${rows[@]}" "${hints[@]}"
        say "$running of ${#names[@]} run"
    else
        say "no worker runs (state directory $STATE_DIR)"
    fi
    if ((running == 0)); then exit 3; fi
    if ((troubled)); then exit 1; fi
}

worker_row() {
    local age=${W_AGE:+${W_AGE}s ago}
    if [[ $W_STALE == true ]]; then age="${age:-none yet} (stale)"; fi
    printf '%-7s %-10s %8s %10s %9s %8s  %-22s %s' "${1%-*}" "$1" "${W_PID:--}" "$(span "$W_UPTIME")" \
        "${R_IN_FLIGHT:--}" "${R_DONE:--}" "$W_STATE" "${age:--}"
}

# What to do about a worker that does not run, or says nothing.
worker_hint() {
    case $W_STATE in
        dead) printf '%s died without being stopped; its log: manage_workers.sh logs %s; then: start' "$1" "$1" ;;
        stopped) printf '%s ended in order, though not by manage_workers.sh; bring it back with: start' "$1" ;;
        *) printf '%s runs but says nothing: it hangs, or a signal has stopped it; restart %s helps' "$1" "$1" ;;
    esac
}

worker_json() {
    printf '{"name":"%s","tier":"%s","worker":%s,"pid":%s,"runs":%s,"state":"%s","stale":%s' "$1" "${1%-*}" \
        "$(or_null "${R_ID:+\"$R_ID\"}")" "$(or_null "$W_PID")" "$W_RUNS" "$W_STATE" "$W_STALE"
    printf ',"uptime_s":%s,"slots":%s,"in_flight":%s,"done":%s,"heartbeat_age_s":%s}' "$(or_null "$W_UPTIME")" \
        "$(or_null "$R_SLOTS")" "$(or_null "$R_IN_FLIGHT")" "$(or_null "$R_DONE")" "$(or_null "$W_AGE")"
}

or_null() { printf '%s' "${1:-null}"; }

# span SECONDS: as people read it, 4s, 12m03s, 5h07m, 3d04h.
span() {
    local s=$1
    if [[ -z $s ]]; then
        printf -- '-'
    elif ((s < 60)); then
        printf '%ds' "$s"
    elif ((s < 3600)); then
        printf '%dm%02ds' $((s / 60)) $((s % 60))
    elif ((s < 86400)); then
        printf '%dh%02dm' $((s / 3600)) $((s % 3600 / 60))
    else
        printf '%dd%02dh' $((s / 86400)) $((s % 86400 / 3600))
    fi
}

command_logs() {
    local file name
    local -a files=()
    for file in "$STATE_DIR"/*.log; do
        name=${file##*/}
        name=${name%.log}
        if [[ -e $file ]] && is_selection "$name" && selected "$name"; then files+=("$file"); fi
    done
    ((${#files[@]})) || die "there is no log of ${SELECTION:-any worker} in $STATE_DIR; was it ever started?"
    if [[ -n $FOLLOW ]]; then
        # By name: a log that is put aside at a restart is followed into the new one.
        exec tail -n "$LINES_SHOWN" -F "${files[@]}"
    fi
    exec tail -n "$LINES_SHOWN" "${files[@]}"
}
