#!/usr/bin/env bash
# Show the log of a run and what is added to it, until the run ends.
#
#   bash launch/logs.sh NAME --tpu=NAME --zone=ZONE
#
#   --worker=0      whose: a number, a range, or all, with the name of the VM before each line
#   --lines=100     how much of what is there already; +1 for all
set -euo pipefail
# shellcheck source=launch/gcloud.sh
source "$(dirname "${BASH_SOURCE[0]}")/gcloud.sh"
worker=0 lines=100
parse_for_slice "worker lines" "" "$@"
one_name
[[ $lines =~ ^\+?[0-9]+$ ]] || fail "--lines=$lines: expected a number, or +1 for all"

show=$(quoted bash llm_jax/launch/worker/job.sh follow "$name" "$lines")
# shellcheck disable=SC2016 # the worker's HOSTNAME
[[ $worker =~ ^[0-9]+$ ]] || show+=' | sed -u "s/^/$HOSTNAME: /"'
on_workers "$worker" "$show"
