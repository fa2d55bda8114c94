#!/usr/bin/env bash
# End a run on all workers by SIGTERM, on which training saves a checkpoint, and wait until it has ended.
#
#   bash launch/stop.sh NAME --tpu=NAME --zone=ZONE
set -euo pipefail
# shellcheck source=launch/gcloud.sh
source "$(dirname "${BASH_SOURCE[0]}")/gcloud.sh"
parse_for_slice "" "" "$@"
one_name
job all stop "$name"
