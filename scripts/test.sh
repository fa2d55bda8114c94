#!/usr/bin/env bash
# Style, types and the fast tests, in an environment that it makes itself.
#
#   bash scripts/test.sh                        # everything but the slow tests
#   bash scripts/test.sh tests/ops -k rope      # arguments go to pytest
#   bash scripts/test.sh -m slow                # only the slow tests
#   WORKERS=1 bash scripts/test.sh              # no parallel test processes (default: one per core, at most 4)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/env.sh
source scripts/env.sh
prepare_environment test

stage() {
    printf '[test] %s\n' "$*" >&2
    "$@"
}

stage ruff check .
stage ruff format --check .
stage pyright --pythonpath "$VENV_PYTHON"
stage python -m pytest -m "not slow and not tpu and not gpu" \
    --numprocesses "${WORKERS:-logical}" --maxprocesses 4 --dist loadfile "$@"
