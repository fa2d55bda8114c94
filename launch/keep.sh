#!/usr/bin/env bash
# Keep a run alive on slices that may be taken away: create, set up, run; when the slice is lost, delete what is left
# of it, and again. The same command goes on from its last checkpoint, which therefore has to be where it outlives
# the slice: in a bucket.
#
#   bash launch/keep.sh NAME --tpu=NAME --zone=ZONE --topology=v5e:4x4 --spot --bucket=BUCKET -- \
#       python scripts/train.py --config=... --workdir=../bucket/NAME
#
# with the flags of launch/create.sh and launch/setup.sh, and
#
#   --max_restarts=20    give up after so many
#   --delete             delete the slice at the end, however the run ended
#   --poll=SECONDS       between looks at the state (default 30)
#
# It runs here, for as long as the run does: in tmux, or on a small VM. A run that fails on a slice that stays is not
# started again, unless with 75 (told to end, and saved), 69 (other processes were lost) or no status at all (the VM
# was restarted). Exit status: the run's; 3 after too many restarts.
set -euo pipefail
# shellcheck source=launch/gcloud.sh
source "$(dirname "${BASH_SOURCE[0]}")/gcloud.sh"
for_create="topology reservation valid_for runtime_version gcloud_flags" for_setup="repository ref bucket"
for flag in $for_create $for_setup spot reserved delete; do printf -v "$flag" ''; done
max_restarts=20
parse_for_slice "$for_create $for_setup max_restarts poll" "spot reserved delete" "$@"
one_name
need topology
is_number poll max_restarts
((${#command[@]})) || fail "there is no command: put it after a lone --"
create=(--poll="$poll") setup=()
for flag in $for_create; do [[ -z ${!flag} ]] || create+=("--$flag=${!flag}"); done
for flag in $for_setup; do [[ -z ${!flag} ]] || setup+=("--$flag=${!flag}"); done
for flag in spot reserved; do [[ -z ${!flag} ]] || create+=("--$flag"); done

script() { # one of those beside this one, its arguments
    bash "$here/$1.sh" ${dry_run:+--dry_run} "${@:2}"
}

passing() { # a state that becomes another one by itself
    [[ $1 =~ ^(SUSPENDING|DELETING|STOPPING|STARTING|RESTARTING|REIMAGING|REPAIRING)$ ]]
}

start() { # fails with 3 where the slice does not come
    local now
    while now=$(patient_state) && passing "$now"; do sleep "$poll"; done
    case $now in
    '') return 1 ;;
    ACTIVE) [[ $(job 0 result "$name" 2>/dev/null) != running ]] || return 0 ;; # keep.sh was started again
    CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING) wait_until_active || return ;;
    NONE) script create "${create[@]}" || return ;;
    *) { script delete --yes && script create "${create[@]}"; } || return ;;
    esac
    script setup "${setup[@]}" && script run "$name" --detach -- "${command[@]}"
}

watch() { # until the run has ended or the slice is lost; sets ended to the status or the state
    local result='' misses=0 failures=0
    while sleep "$poll"; do
        ended=$(patient_state) || continue
        if passing "$ended"; then
            continue
        elif [[ $ended != ACTIVE ]]; then
            return
        elif ! result=$(job 0 result "$name"); then
            ((++misses < 10)) || { ended=UNREACHABLE && return; }
        elif [[ $result == running ]]; then
            misses=0
        elif [[ $result == 0 ]]; then
            ended=0 && return
        elif ((++failures > 3)); then # runs die of a slice that is going away before its state says so
            # What went wrong on the worker where it began: not 69, which is what the others end with.
            ended=$(job all result "$name" | sort -n | grep -vx -e running -e 0 -e 69 | head -n 1) || ended=$result
            return
        fi
    done
}

if [[ -n $dry_run ]]; then
    script create "${create[@]}"
    script setup "${setup[@]}"
    script run "$name" --detach -- "${command[@]}"
    echo "# every $poll seconds:"
    queued_resource describe --format='value(state.state)'
    node describe --format='value(state)'
    job 0 result "$name"
    echo "# when the slice is lost, and then all of it again:"
    script delete
    exit
fi
for ((restarts = 0; ; restarts++)); do
    status=0
    start || status=$?
    if ((status == 0)); then watch; else ended=$(patient_state); fi
    if ((status != 0 && status != 3)) && [[ $ended == ACTIVE || $ended == NONE ]]; then
        ended=$status # a mistake, which will not go away by itself
        break
    fi
    say "$name: $ended"
    [[ $ended =~ ^([A-Z_]+|lost|69|75)$ ]] || break
    ((restarts < max_restarts)) || { say "gave up after $restarts restarts" && ended=3 && break; }
    say "restart $((restarts + 1)) of at most $max_restarts"
    [[ $ended != UNREACHABLE ]] || script delete --yes
    sleep "$poll"
done
[[ -z $delete ]] || script delete --yes
exit "$ended"
