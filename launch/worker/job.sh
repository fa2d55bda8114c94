#!/usr/bin/env bash
# Runs on a worker: starts a command that outlives the connection, and tells of it. The scripts above call it.
#
#   job.sh idle                   fail where a run is going on, and name it
#   job.sh start NAME COMMAND...  start COMMAND in the folder of the code, with the environment's bin/ on PATH
#   job.sh follow NAME LINES      print the last LINES of the log and what comes, until the run ends
#   job.sh result NAME            print its exit status, `running`, or `lost`: killed in a way that left no status
#   job.sh wait NAME              wait for the end and exit with its status; show the end of the log where that is not 0
#   job.sh stop NAME              SIGTERM, and wait for the end
#   job.sh status                 a line for each run
#
# ~/llm_jax_runs/NAME/ holds command, log, pid and, once it has ended, exit_status.
set -euo pipefail
code=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
verb=$1 name=${2:-} dir=$HOME/llm_jax_runs/${2:-}
say() { printf '%s: %s\n' "$HOSTNAME" "$*"; }

result() { # of the run in a folder
    local alive=''
    # Its shell is looked for by name: after a restart of the VM the number may be another process's.
    ! grep -qsa llm_jax_run "/proc/$(<"$1/pid")/cmdline" || alive=1
    if [[ -f $1/exit_status ]]; then cat "$1/exit_status"; elif [[ -n $alive ]]; then echo running; else echo lost; fi
}

finish() { # wait for the end and print the exit status
    while [[ $(result "$dir") == running ]]; do sleep 0.2; done
    result "$dir"
}

idle() {
    local other
    for other in "$HOME"/llm_jax_runs/*/; do
        [[ -f $other/pid && $(result "$other") == running ]] || continue
        say "$(basename "$other") is running: wait for it (launch/logs.sh) or end it (launch/stop.sh)"
        exit 1
    done
}

start() {
    idle
    mkdir -p "$dir"
    rm -f "$dir/exit_status"
    printf '%q ' "$@" >"$dir/command"
    echo "== $(date -u +%FT%TZ) $(<"$dir/command")" >>"$dir/log"
    cd "$code"
    # A session of its own, all of which can be told to end. Its shell outlives SIGTERM, to note the status.
    # shellcheck disable=SC2016
    PATH=$code/.venv/bin:$PATH setsid bash -c '
        trap : TERM INT
        "${@:2}"
        echo $? >"$1/ended" && mv "$1/ended" "$1/exit_status"
    ' llm_jax_run "$dir" "$@" </dev/null >>"$dir/log" 2>&1 &
    echo $! >"$dir/pid"
    # Until its shell has its name, or is gone already, perhaps without a status.
    until [[ -f $dir/exit_status || $(result "$dir") == running ]] || ! kill -0 $! 2>/dev/null; do sleep 0.05; done
    say "$name has started"
}

case $verb in
idle)
    idle
    exit
    ;;
start)
    start "${@:3}"
    exit
    ;;
status)
    for dir in "$HOME"/llm_jax_runs/*/; do
        [[ ! -f $dir/pid ]] || say "$(basename "$dir"): $(result "$dir"): $(<"$dir/command")"
    done
    exit
    ;;
esac
[[ -f $dir/pid ]] || { say "there is no run $name" && exit 2; }
case $verb in
result) result "$dir" ;;
follow)
    tail --lines="$3" --follow --sleep-interval=0.2 "$dir/log" &
    finish >/dev/null
    sleep 0.5 && kill $! # when tail has looked again
    ;;
stop)
    # It may have ended by itself in between.
    [[ $(result "$dir") != running ]] || kill -TERM -- "-$(<"$dir/pid")" 2>/dev/null || true
    say "$name: exit status $(finish)"
    ;;
wait)
    status=$(finish)
    [[ $status == 0 ]] || tail --lines=20 "$dir/log" | sed "s/^/$HOSTNAME: /"
    say "$name: exit status $status"
    exit "${status/lost/137}"
    ;;
*) echo "job.sh: unknown verb $verb" >&2 && exit 2 ;;
esac
