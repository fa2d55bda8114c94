#!/usr/bin/env bash
# The main job, start to end, on a CPU: the documents' example, sentiment training and its answer, text
# generation on one device and on four, and the plots. Under five minutes on two cores once installed.
#
#   bash scripts/quickstart.sh            # results go to runs/quickstart (OUT=DIR for elsewhere)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/env.sh
source scripts/env.sh
prepare_environment

out=${OUT:-runs/quickstart}
rm -rf "$out"
mkdir -p "$out"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
prompt=我喜欢编程。
sentence=我是一个热爱编程的程序员。

stage() { printf '\n[quickstart] %s\n' "$*"; }
failed() { printf '\n[quickstart] FAILED in stage: %s\n' "$current" >&2; }
trap failed ERR

current="1/5 the documents' literal example, 2000 seeds at once"
stage "$current"
python scripts/train.py --config=configs/documents_mlp.py --workdir="$out/documents_mlp" >"$out/documents_mlp.txt"

current="2/5 train a sentiment classifier on Chinese sentences"
stage "$current"
python scripts/train.py --config=configs/sentiment.py --workdir="$out/sentiment"

current="3/5 classify $sentence"
stage "$current"
python scripts/classify.py --checkpoint="$out/sentiment" --text="$sentence"

current="4/5 generate from $prompt on one device"
stage "$current"
generate() { python scripts/generate.py --prompt="$prompt" --max_new_tokens=40 --temperature=0 "$@"; }
generate --timeline="$out/plots/timeline.json"

current="5/5 the same on four devices, the same tokens"
stage "$current"
generate --json >"$out/one_device.json"
XLA_FLAGS=--xla_force_host_platform_device_count=4 generate --mesh=data:1,fsdp:1,tensor:4 --json >"$out/four_devices.json"
python - "$out/one_device.json" "$out/four_devices.json" <<'PYTHON'
import json, sys

one, four = (json.load(open(path, encoding="utf-8")) for path in sys.argv[1:])
if one["token_ids"] != four["token_ids"]:
    sys.exit(f"tokens differ:\n  1 device  {one['token_ids']}\n  4 devices {four['token_ids']}")
print(f"{len(four['token_ids'])} tokens, identical: {four['prompt']}{four['text']}")
PYTHON

current="done"
stage "plots"
find "$out" -name '*.png' | sort
