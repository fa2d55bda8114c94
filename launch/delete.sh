#!/usr/bin/env bash
# Delete a slice: its queued resource, its VMs and their disks. What is to be kept is fetched before: launch/fetch.sh.
#
#   bash launch/delete.sh --tpu=NAME --zone=ZONE
#
#   --yes    do not ask
set -euo pipefail
# shellcheck source=launch/gcloud.sh
source "$(dirname "${BASH_SOURCE[0]}")/gcloud.sh"
yes=''
parse_for_slice "" "yes" "$@"
nothing_else

if [[ -z $yes && -z $dry_run ]]; then
    [[ -t 0 ]] || fail "standard input is no terminal to ask at: add --yes to delete $TPU"
    now=$(state)
    read -rp "Delete $TPU in $ZONE, which is $now, with all that is on its disks? [y/N] " answer
    [[ $answer == [yY]* ]] || fail "$TPU stays"
fi
queued_resource delete --force --quiet # --force: its node, too
[[ -n $dry_run ]] || say "$TPU is deleted"
