#!/usr/bin/env bash
# Copy a folder or file to this machine: from worker 0 of a slice, or from a bucket.
#
#   bash launch/fetch.sh runs/sentiment --tpu=NAME --zone=ZONE       # ~/llm_jax/runs/sentiment of worker 0
#   bash launch/fetch.sh gs://BUCKET/sentiment                       # no slice needed
#
#   --to=runs    folder that it comes into
set -euo pipefail
# shellcheck source=launch/gcloud.sh
source "$(dirname "${BASH_SOURCE[0]}")/gcloud.sh"
to=runs
if [[ " $* " == *" gs://"* ]]; then parse "tpu zone project to" "" "$@"; else parse_for_slice "to" "" "$@"; fi
((${#words[@]} == 1)) || fail "expected one folder or file, and got: ${words[*]:-none}; see --help"
source=${words[0]%/}
[[ -n $source ]] || fail "${words[0]}: fetching the whole disk is not possible"

run mkdir -p "$to"
case $source in
gs://*) run gcloud storage rsync --recursive "$source" "$to/$(basename "$source")" ;;
/*) copy "$TPU:$source" "$to" --recurse --worker=0 ;;
*) copy "$TPU:llm_jax/$source" "$to" --recurse --worker=0 ;;
esac
[[ -n $dry_run ]] || say "$source is in $to/$(basename "$source")"
