# shellcheck shell=bash
# One TPU slice through gcloud: its queued resource, its node, its workers, its state.
#
# Flags of every script for TPU VMs; the first three may be given by the variables TPU, ZONE and PROJECT instead:
#
#   --tpu=NAME          of the queued resource and of its node
#   --zone=ZONE
#   --project=PROJECT   (default: that of `gcloud config`)
#   --dry_run           print each command that would be run, ready to paste, and run none
#   --help

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
export TPU=${TPU:-} ZONE=${ZONE:-} PROJECT=${PROJECT:-} # for scripts that this one calls
poll=${POLL:-30}

usage() { # the comment at the top of the script, and the flags above
    header "$0"
    echo
    sed -n '/^# Flags/,/^$/s/^# \{0,1\}//p' "$here/gcloud.sh"
}

parse_for_slice() { # as parse
    local tpu=$TPU zone=$ZONE project=$PROJECT
    parse "tpu zone project $1" "${@:2}"
    need tpu zone
    TPU=$tpu ZONE=$zone PROJECT=$project
}

queued_resource() { # a verb, its flags
    run gcloud compute tpus queued-resources "$1" "$TPU" "${@:2}" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"}
}

node() { # a verb, its flags
    run gcloud compute tpus tpu-vm "$1" "$TPU" "${@:2}" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"}
}

copy() { # sources, destination, flags of scp
    run gcloud compute tpus tpu-vm scp "$@" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"}
}

on_workers() { # which (all, 0, 1-3), a command for a shell there; a dead connection is noticed
    node ssh --worker="$1" --ssh-flag=-oConnectTimeout=30 --ssh-flag=-oServerAliveInterval=30 --command="$2"
}

job() { # which workers, a verb of worker/job.sh, its arguments
    on_workers "$1" "$(quoted bash llm_jax/launch/worker/job.sh "${@:2}")"
}

# The state of the slice in one word: NONE, that of the queued resource, or, once it is ACTIVE, that of its node
# where it is not READY (PREEMPTED, say). Fails where gcloud fails.
state() {
    local found errors status=0
    errors=$(mktemp)
    found=$(queued_resource describe --format='value(state.state)' 2>"$errors") || status=$?
    if ((status == 0)); then
        [[ $found != ACTIVE ]] || found=$(node describe --format='value(state)') || status=$?
        [[ $found != READY ]] || found=ACTIVE
    elif grep -q NOT_FOUND "$errors"; then
        found=NONE status=0
    else
        cat "$errors" >&2
    fi
    rm -f "$errors"
    ((status == 0)) || return "$status"
    echo "$found"
}

patient_state() { # as state, but gcloud may fail nine times in a row
    local _
    for _ in {1..9}; do
        state && return
        sleep "$poll"
    done
    state
}

wait_until_active() { # fails with 3 where that will not be
    local now before=''
    while true; do
        now=$(patient_state) || return
        [[ $now == "$before" ]] || say "$(date +%H:%M:%S) $now"
        before=$now
        case $now in
        ACTIVE) return ;;
        CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | STARTING) sleep "$poll" ;;
        *) say "for the reason: $(quoted gcloud compute tpus queued-resources describe "$TPU" --zone="$ZONE")" && return 3 ;;
        esac
    done
}
