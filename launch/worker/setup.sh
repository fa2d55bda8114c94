#!/usr/bin/env bash
# Runs on a worker: Python 3.11 or newer, the environment .venv, a mounted bucket; then says what there is.
#
#   bash launch/worker/setup.sh [EXTRA [BUCKET]]     # an extra of setup.py (default tpu); a bucket, for ~/bucket
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
extra=${1:-tpu} bucket=${2:-}
# shellcheck source=scripts/env.sh
source scripts/env.sh
# shellcheck source=launch/version.sh
source launch/version.sh

install() { sudo apt-get -o DPkg::Lock::Timeout=600 install --quiet --yes "$@" >&2; }

if ! find_python >/dev/null 2>&1; then # the images' own is 3.10
    sudo add-apt-repository --yes ppa:deadsnakes/ppa >&2
    install python3.12 python3.12-venv
fi
prepare_environment "$extra"

if [[ -n $bucket ]] && ! mountpoint --quiet ~/bucket; then
    if ! command -v gcsfuse >/dev/null; then
        key=/usr/share/keyrings/cloud.google.asc
        curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
        echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
            sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
        sudo apt-get update --quiet >&2
        install gcsfuse
    fi
    mkdir -p ~/bucket
    # Nothing is remembered of the bucket: each worker has to see at once what another one wrote.
    gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$bucket" ~/bucket >&2
fi

python - <<'PYTHON'
import jax

here, everywhere = jax.local_device_count(), jax.device_count()
print(f"process {jax.process_index()} of {jax.process_count()}: {here} of {everywhere} devices", flush=True)
if jax.process_index() == 0:
    print(jax.devices(), flush=True)
PYTHON
echo "code version: $(code_version)"
