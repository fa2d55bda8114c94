#!/usr/bin/env bash
# The state of a slice, its VMs, and the runs on each of them.
#
#   bash launch/status.sh --tpu=NAME --zone=ZONE
set -euo pipefail
# shellcheck source=launch/gcloud.sh
source "$(dirname "${BASH_SOURCE[0]}")/gcloud.sh"
parse_for_slice "" "" "$@"
nothing_else

if [[ -n $dry_run ]]; then
    queued_resource describe --format='value(state.state)'
    node describe --format='value(state)'
else
    now=$(state)
    echo "$TPU: $now"
    [[ $now == ACTIVE ]] || exit 0
fi
node describe --format='value(acceleratorType,runtimeVersion,health,networkEndpoints[].ipAddress)'
job all status
