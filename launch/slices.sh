# shellcheck shell=bash
# TPU slices: `describe_slice v5e:4x4` sets generation, topology, chips, hosts, chips_per_host, accelerator_type,
# runtime_version and gke_label, or fails and says what there is.
#
# Sources: cloud.google.com/tpu/docs/{runtimes,v4,v5e,v5p,v6e} and, for the labels of GKE's nodes,
# cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus. Accelerator types count cores where a chip has two,
# and stand for the shapes listed here. The Cloud TPU API does not offer tpu7x; GKE does.
# shellcheck disable=SC2034

FLAT="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
CUBES="2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16"

# generation, shapes, cores of a chip that the accelerator type counts, that type, runtime version, GKE's label
SLICES="
v4     CUBES  2  v4         tpu-ubuntu2204-base  tpu-v4-podslice
v5e    FLAT   1  v5litepod  v2-alpha-tpuv5-lite  tpu-v5-lite-podslice
v5p    CUBES  2  v5p        v2-alpha-tpuv5       tpu-v5p-slice
v6e    FLAT   1  v6e        v2-alpha-tpuv6e      tpu-v6e-slice
tpu7x  CUBES  2  -          -                    tpu7x
"

describe_slice() {
    local name shapes cores type side
    generation=${1%%:*} topology=${1#*:}
    while read -r name shapes cores type runtime_version gke_label; do
        [[ $name != "$generation" || $1 != *:* ]] || break
    done <<<"$SLICES"
    [[ -n $name ]] || fail "--topology=$1: expected GENERATION:SHAPE, such as v5e:4x4, of v4, v5e, v5p, v6e or tpu7x"
    [[ " ${!shapes} " == *" $topology "* ]] || fail "--topology=$1: the shapes of $name are ${!shapes}"

    chips=1
    for side in ${topology//x/ }; do chips=$((chips * side)); done
    # A VM holds up to eight chips of v5e and v6e, and all of them; larger slices consist of VMs with four.
    chips_per_host=4
    [[ $shapes == CUBES ]] || ((chips > 8)) || chips_per_host=$chips
    hosts=$((chips / chips_per_host))
    accelerator_type=$type
    [[ $type == - ]] || accelerator_type=$type-$((chips * cores))
}
