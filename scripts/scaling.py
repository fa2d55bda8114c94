"""How cost grows on this machine's CPU: compile time, checkpoints, memory of the host; JSON lines.

    python scripts/scaling.py --what=compile --layers=2,8,32 --devices=1,8
    python scripts/scaling.py --what=checkpoint --embed=256,512,1024 --layers=8
    python scripts/scaling.py --what=memory --embed=1024 --devices=1,2,4,8

Every combination is measured --repeats times, each in a process of its own, in turns; printed are
medians. Devices are JAX's CPU devices, a mesh of fsdp. docs/scaling.md has one machine's figures.
"""

import itertools
import json
import statistics
import sys

from absl import app, flags

from llm_jax import cli
from llm_jax.bench.scaling import measure

WHAT = flags.DEFINE_enum("what", "compile", ["compile", "checkpoint", "memory"], "What to measure.")
LAYERS = flags.DEFINE_list("layers", ["2"], "Of the model.")
EMBED = flags.DEFINE_list("embed", ["256"], "Its width, multiples of 64.")
DEVICES = flags.DEFINE_list("devices", ["1"], "CPU devices.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Of each measurement.", lower_bound=1)


def numbers(name: str, texts: list[str], unit: int = 1) -> list[int]:
    """The values of a flag. Raises ValueError for what is no positive multiple of `unit`."""
    if wrong := [x for x in texts if not x.isdigit() or not int(x) or int(x) % unit]:
        raise ValueError(f"--{name}={wrong[0]}: expected positive multiples of {unit}")
    return [int(x) for x in texts]


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    layers, devices = numbers("layers", LAYERS.value), numbers("devices", DEVICES.value)
    cases = list(itertools.product(layers, numbers("embed", EMBED.value, 64), devices))
    found: dict[tuple, list] = {case: [] for case in cases}
    for i, case in itertools.product(range(REPEATS.value), cases):
        print(f"{WHAT.value} {case}, {i + 1} of {REPEATS.value}", file=sys.stderr, flush=True)
        one, embed, count = case
        found[case].append(measure(WHAT.value, layers=one, embed=embed, devices=count))
    for records in found.values():
        middle = {k: statistics.median(r[k] for r in records) for k in records[0] if k != "what"}
        print(json.dumps({"what": WHAT.value} | middle), flush=True)


if __name__ == "__main__":
    cli.run(main)
