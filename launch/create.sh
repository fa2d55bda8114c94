#!/usr/bin/env bash
# Request a TPU slice as a queued resource and wait until it is ACTIVE. It costs money from then on, until
# launch/delete.sh.
#
#   bash launch/create.sh --tpu=NAME --zone=ZONE --topology=v5e:4x4 --spot
#
#   --topology=v5e:4x4        generation and shape: of v4, v5e, v5p, v6e
#   --spot                    cheap, and may be taken away at any time: see launch/keep.sh
#   --reserved                from any reservation of the project
#   --reservation=NAME        from this one (a flag of `gcloud alpha`)
#   --valid_for=6h            give up when the slice has not come by then (default: wait for ever)
#   --runtime_version=NAME    image of the VMs (default: that of the generation)
#   --gcloud_flags="..."      further ones of `gcloud compute tpus queued-resources create`, split at spaces,
#                             such as "--network=NET --service-account=EMAIL"
#   --poll=SECONDS            between looks at the state (default 30)
#
# Exit status: 0 ACTIVE; 3 over before it was (FAILED, say): delete it, and request it again; others: mistakes.
set -euo pipefail
# shellcheck source=launch/gcloud.sh
source "$(dirname "${BASH_SOURCE[0]}")/gcloud.sh"
# shellcheck source=launch/slices.sh
source "$here/slices.sh"
topology='' spot='' reserved='' reservation='' valid_for='' runtime_version='' gcloud_flags=''
parse_for_slice "topology reservation valid_for runtime_version gcloud_flags poll" "spot reserved" "$@"
nothing_else
need topology
is_number poll
image=$runtime_version
describe_slice "$topology"
[[ $accelerator_type != - ]] || fail "--topology=$generation:$topology: the Cloud TPU API has no $generation; use launch/gke/"
((${#spot} + ${#reserved} + (${#reservation} > 0) <= 1)) || fail "--spot, --reserved and --reservation exclude each other"

flags=(--node-id="$TPU" --accelerator-type="$accelerator_type" --runtime-version="${image:-$runtime_version}")
[[ -z $spot ]] || flags+=(--spot)
[[ -z $reserved ]] || flags+=(--reserved)
[[ -z $valid_for ]] || flags+=(--valid-until-duration="$valid_for")
read -ra more <<<"$gcloud_flags"
say "$TPU: $chips chips $generation:$topology on $hosts VMs of $chips_per_host"
if [[ -z $reservation ]]; then
    queued_resource create "${flags[@]}" "${more[@]}"
else
    run gcloud alpha compute tpus queued-resources create "$TPU" "${flags[@]}" --reservation="$reservation" \
        "${more[@]}" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"}
fi

if [[ -n $dry_run ]]; then
    echo "# every $poll seconds, until it says ACTIVE and then READY:"
    queued_resource describe --format='value(state.state)'
    node describe --format='value(state)'
else
    wait_until_active
fi
