#!/usr/bin/env bash
# Runs a command as N processes of one program on this machine: jax.distributed over loopback, on CPUs.
#
#   launch/local.sh 2 python scripts/train.py --config=configs/demo_lm.py --workdir=runs/lm --mesh=data:-1
#   launch/local.sh --devices=4 2 python scripts/generate.py --prompt=我喜欢 --mesh=tensor:8
#
# --devices=M gives each process M devices (1). Each line of output begins with the number of its process.
# When one fails, the others have 60 s to notice it and to say what they know; then they are killed. The
# status is that of the one that failed first. Ctrl-C or SIGTERM stops all (training saves); twice kills.
set -euo pipefail

devices=1
if [[ ${1-} == --devices=* ]]; then
    devices=${1#*=}
    shift
fi
number='^[1-9][0-9]*$'
if [[ $# -lt 2 || ! $1 =~ $number || ! $devices =~ $number ]]; then
    echo "usage: launch/local.sh [--devices=M] N COMMAND [ARGUMENT...]" >&2
    exit 2
fi
count=$1
shift

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:$port
export JAX_NUM_PROCESSES=$count JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} PYTHONUNBUFFERED=1
export XLA_FLAGS="${XLA_FLAGS-} --xla_force_host_platform_device_count=$devices"

label() { # each line of standard input
    while IFS= read -r line || [[ -n $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

pids=()
for ((i = 0; i < count; i++)); do
    JAX_PROCESS_ID=$i "$@" </dev/null > >(label "$i") 2> >(label "$i" >&2) &
    pids+=($!)
done
signal=TERM
trap 'kill -"$signal" "${pids[@]}" 2>/dev/null; signal=KILL' INT TERM

failure=0
while [[ ${#pids[@]} -gt 0 ]]; do
    sleep 0.2 || true # which a signal cuts short
    for i in "${!pids[@]}"; do
        if kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
        status=0
        wait "${pids[i]}" || status=$?
        unset "pids[i]"
        if [[ $status -eq 0 ]]; then continue; fi
        echo "[local] process $i ended with status $status" >&2
        if [[ $failure -eq 0 ]]; then failure=$status deadline=$((SECONDS + 60)); fi
    done
    if [[ $failure -ne 0 && $SECONDS -gt $deadline ]]; then
        kill -KILL "${pids[@]}" 2>/dev/null || true
    fi
done
exit "$failure"
