#!/usr/bin/env bash
# Bring the code to all workers of a slice, with Python and all packages, and check that all have the same.
#
#   bash launch/setup.sh --tpu=NAME --zone=ZONE                              # this folder, uncommitted changes and all
#   bash launch/setup.sh --tpu=NAME --zone=ZONE --repository=URL --ref=v1.0
#
# The code comes to ~/llm_jax. Run it again after changes: files that are gone here go there, too; what else is
# there (.venv, runs/) stays.
#
#   --repository=URL    clone this instead
#   --ref=NAME          its branch, tag or commit (default main)
#   --bucket=NAME       mount this bucket at ~/bucket on each worker, for what has to outlive the slice
set -euo pipefail
# shellcheck source=launch/gcloud.sh
source "$(dirname "${BASH_SOURCE[0]}")/gcloud.sh"
# shellcheck source=launch/version.sh
source "$here/version.sh"
repository='' ref='' bucket='' expected=''
parse_for_slice "repository ref bucket" "" "$@"
nothing_else
[[ -z $ref || -n $repository ]] || fail "--ref=$ref: only with --repository"

pack() { # what git tracks or would track, as it is now, and the list of it; sets expected
    local name
    cd "$here/.."
    git ls-files -z --cached --others --exclude-standard | while IFS= read -rd '' name; do
        [[ ! -f $name ]] || printf '%s\0' "$name"
    done >"$scratch/$LISTED"
    expected=$(checksum "$scratch/$LISTED")
    tar -czf "$scratch/code.tar.gz" -C "$scratch" "$LISTED" -C "$PWD" --null -T "$scratch/$LISTED"
}

idle="{ [ ! -f llm_jax/launch/worker/job.sh ] || bash llm_jax/launch/worker/job.sh idle; }"
if [[ -n $repository ]]; then
    get="{ [ -d llm_jax/.git ] || git clone -q $(quoted "$repository") llm_jax; } && cd llm_jax"
    get+=" && git fetch -q origin $(quoted "${ref:-main}") && git checkout -q FETCH_HEAD"
else
    if [[ -z $dry_run ]]; then
        scratch=$(mktemp -d)
        trap 'rm -rf "$scratch"' EXIT
        pack
    else
        scratch=FOLDER
        echo "# FOLDER/code.tar.gz: what git tracks or would track, as \`pack\` in launch/setup.sh makes it"
    fi
    copy "$scratch/code.tar.gz" "$TPU:code.tar.gz" --worker=all
    get="mkdir -p llm_jax && cd llm_jax && { [ ! -f $LISTED ] || xargs -0 rm -f <$LISTED; } && tar -xzf ../code.tar.gz"
fi
commands="$idle && $get && bash launch/worker/setup.sh tpu${bucket:+ $(quoted "$bucket")}"
if [[ -n $dry_run ]]; then
    on_workers all "$commands"
    exit
fi
versions=$(on_workers all "$commands" | tee /dev/stderr | sed -n 's/^code version: //p' | sort -u)
[[ $versions == "${expected:-$versions}" && $(wc -w <<<"$versions") == 1 ]] ||
    fail "the workers should all have one code version, ${expected:-any}, and have ${versions//$'\n'/, }"
say "all workers have code version $versions"
