#!/usr/bin/env bash
# Run a command on all workers of a slice, in ~/llm_jax with the environment's bin/ on PATH. It outlives the
# connection; a second one is refused while it runs.
#
#   bash launch/run.sh NAME --tpu=NAME --zone=ZONE -- python scripts/train.py --config=... --workdir=../bucket/NAME
#
# Then it shows the log of worker 0 and ends, when all workers have, with the exit status of the run. Ctrl-C ends
# the showing, not the run.
#
#   --detach    return as soon as it has started
#
# Each worker has ~/llm_jax_runs/NAME/log and, at the end, exit_status.
set -euo pipefail
# shellcheck source=launch/gcloud.sh
source "$(dirname "${BASH_SOURCE[0]}")/gcloud.sh"
detach=''
parse_for_slice "" "detach" "$@"
one_name
((${#command[@]})) || fail "there is no command: put it after a lone --"

job all idle # on all, before it starts on any
if ! job all start "$name" "${command[@]}"; then
    job all stop "$name" || true
    say "$name did not start everywhere, and was stopped where it had" && exit 1
fi
[[ -z $detach ]] || exit 0
trap 'say "$name goes on: launch/logs.sh shows it, launch/stop.sh ends it"; exit 130' INT
job 0 follow "$name" +1 || say "the connection is lost, $name goes on; waiting for its end"
job all wait "$name"
