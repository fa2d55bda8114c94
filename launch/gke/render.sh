#!/usr/bin/env bash
# Print the JobSet of a run on a TPU slice of a GKE cluster: launch/gke/jobset.yaml, filled in.
#
#   bash launch/gke/render.sh --name=demo --topology=v6e:4x4 --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/llm_jax \
#       --bucket=BUCKET --service_account=ACCOUNT --spot -- \
#       python scripts/train.py --config=configs/demo_lm.py --workdir=/bucket/demo --mesh=fsdp:16 | kubectl apply -f -
#
#   --name=NAME                 of the JobSet: lower-case letters, digits and -, at most 40
#   --topology=v6e:4x4          generation and shape: of v4, v5e, v5p, v6e, tpu7x
#   --image=IMAGE               made from launch/gke/Dockerfile
#   --chips_per_host=4          of the node pool's machines (default: 4, and all of a slice of v5e or v6e up to 8)
#   --bucket=NAME               to mount at /bucket, for what has to outlive the pods; needs --service_account
#   --service_account=NAME      of Kubernetes, with access to the bucket
#   --spot                      on spot nodes
#   --max_restarts=20
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=launch/slices.sh
source "$here/slices.sh"
# shellcheck disable=SC2034 # read by name
name='' topology='' image='' chips_per_host='' bucket='' service_account='' spot='' max_restarts=20
parse "name topology image chips_per_host bucket service_account max_restarts" "spot" "$@"
((${#words[@]} == 0)) || fail "unexpected: ${words[*]}; see --help"
need name topology image
is_number max_restarts
((${#command[@]})) || fail "there is no command: put it after a lone --"
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "--name=$name: lower-case letters, digits and - inside, at most 40"
[[ -z $bucket || -n $service_account ]] || fail "--bucket=$bucket: needs --service_account, which may open it"
asked=$chips_per_host
describe_slice "$topology"
if [[ -n $asked ]]; then
    [[ $asked =~ ^[148]$ && $((chips % asked)) == 0 ]] || fail "--chips_per_host=$asked: expected 1, 4 or 8, a divisor of $chips"
    chips_per_host=$asked hosts=$((chips / asked))
fi

json() { # the command as a list
    local word list=''
    for word in "${command[@]}"; do
        [[ $word != *[[:cntrl:]]* ]] || fail "a word of the command has a line break or the like: ${word@Q}"
        word=${word//\\/\\\\}
        list+=", \"${word//\"/\\\"}\""
    done
    echo "[${list:2}]"
}

text=$(<"$here/gke/jobset.yaml")
# shellcheck disable=SC2034 # read by name
several_hosts=$((hosts > 1 ? 1 : 0))
for flag in spot bucket service_account several_hosts; do
    [[ -n ${!flag#0} ]] || text=$(grep -v "# only with $flag\$" <<<"$text")
done
declare -A values=([NAME]=$name [MAX_RESTARTS]=$max_restarts [HOSTS]=$hosts [CHIPS_PER_HOST]=$chips_per_host
    [ACCELERATOR]=$gke_label [TOPOLOGY]=$topology [IMAGE]=$image [BUCKET]=$bucket [SERVICE_ACCOUNT]=$service_account)
for key in "${!values[@]}"; do text=${text//"\${$key}"/"${values[$key]}"}; done
list=$(json) # last: what the command says is nobody's variable
text=${text//"\${COMMAND}"/"$list"}
printf '%s\n' "$text"
