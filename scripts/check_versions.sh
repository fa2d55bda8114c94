#!/usr/bin/env bash
# The fast tests with the oldest or the newest requirements that setup.py allows, in a scratch environment.
#
#   bash scripts/check_versions.sh oldest                       # exactly the lower bounds: .ci/oldest.txt
#   PYTHON=python3.13 bash scripts/check_versions.sh newest     # the newest releases of today
#   bash scripts/check_versions.sh oldest tests/ops             # further arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
window=${1:-}
case $window in
oldest) export PIP_CONSTRAINT=$PWD/.ci/oldest.txt ;;
newest) ;;
*)
    echo "usage: [PYTHON=python3.x] bash scripts/check_versions.sh oldest|newest [pytest arguments]" >&2
    exit 2
    ;;
esac
shift

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export VENV=$scratch/venv
# shellcheck source=scripts/env.sh
source scripts/env.sh
prepare_environment test
python -m pip list --format=freeze
python -m pytest -m "not slow and not tpu and not gpu" \
    --numprocesses "${WORKERS:-logical}" --maxprocesses 4 --dist loadfile "$@"
