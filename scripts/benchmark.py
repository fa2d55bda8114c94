"""Speed against a peer on the same weights, interleaved in one process: medians and their ratio.

    python scripts/benchmark.py --case=decode --peer=transformers --shape=gpt2 --batch=1,8,32
    python scripts/benchmark.py --case=prefill --peer=transformers --shape=llama160m --prompt_tokens=512
    python scripts/benchmark.py --case=bandwidth
    python scripts/benchmark.py --case=train --peer=torch --shape=gpt2          # or torch_compile
    python scripts/benchmark.py --case=mixed_traffic --requests=64 --max_rows=32
    python scripts/benchmark.py --case=arrivals --rates=0.2,0.5,1
    python scripts/benchmark.py --case=overhead --batch=8               # or prefix, or speculation

Greedy, random weights in float32. decode: tokens per second of all rows, prefill left out. prefill:
prompt tokens per second to the first token. bandwidth: what part of the machine's memory bandwidth a
decode step of one row reaches. train: tokens of optimizer steps. The engine's: mixed_traffic beside
transformers' batches, arrivals, prefix and speculation beside itself without, overhead beside a fixed
batch. --json prints {case, ours, peer, ratio, unit, ...} a line.
"""

import json
import sys
from collections.abc import Iterator

from absl import app, flags

from llm_jax import cli
from llm_jax.bench import generation_cases, serving_cases
from llm_jax.bench.generation_cases import record
from llm_jax.bench.peers import SHAPES, random_model, same_weights
from llm_jax.bench.timing import interleaved
from llm_jax.bench.training import TRAIN_SHAPES, rivals
from llm_jax.kernels.forms import explain

PEERS = {case: ("transformers",) for case in ("decode", "prefill", "bandwidth", "mixed_traffic")}
PEERS |= {case: ("llm_jax",) for case in serving_cases.CASES if case not in PEERS}
PEERS["train"] = ("torch", "torch_compile")
_int = flags.DEFINE_integer
CASE = flags.DEFINE_enum("case", "decode", PEERS, "What to measure.")
PEER = flags.DEFINE_string("peer", None, "Whom to compare with; the default is the case's first.")
SHAPE = flags.DEFINE_enum("shape", "gpt2", sorted({*SHAPES, *TRAIN_SHAPES}), "Size of the model.")
BATCH = flags.DEFINE_list("batch", ["1"], "Rows; several may be given.")
PROMPT = _int("prompt_tokens", None, "Prompt length; default 32, prefill 512.", lower_bound=1)
NEW = _int("new_tokens", 64, "Tokens to decode.", lower_bound=2)
MESH = flags.DEFINE_string("mesh", "", "Our devices with --case=train, such as data:2; '' = one.")
STEPS = _int("steps", 5, "Training steps in a round.", lower_bound=1)
REQUESTS = _int("requests", 64, "Of mixed_traffic, arrivals and prefix.", lower_bound=1)
ROWS = _int("max_rows", 32, "Rows of the engine, and of the peer's batches.", lower_bound=1)
RATES = flags.DEFINE_list("rates", ["0.25", "0.5", "1"], "Requests a second, of arrivals.")
REPEATS = _int("repeats", 5, "Rounds; the medians are reported.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "One JSON object a line on stdout, nothing else.")
EXPLAIN = flags.DEFINE_bool("explain", False, "Tell which form of each operator ran, on stderr.")


def records(case, torch, transformers, peer_name) -> Iterator[dict]:
    """What the case finds."""
    name, new, repeats, batches = SHAPE.value, NEW.value, REPEATS.value, list(map(int, BATCH.value))
    prompt = PROMPT.value or (512 if case == "prefill" else 32)
    if case == "train":
        options = {"compiled": peer_name == "torch_compile", "steps": STEPS.value, "mesh": MESH.value}
        speeds = interleaved(rivals(torch, name, **options), repeats)
        yield record(f"train/{name}/{peer_name}", speeds["ours"], speeds["peer"])
        return
    peer = random_model(transformers, name)
    llm = same_weights(peer)
    if case == "bandwidth":
        yield generation_cases.bandwidth(torch, llm, peer, name, prompt, new, repeats)
    elif case in serving_cases.CASES:
        rates = list(map(float, RATES.value))
        sizes = (repeats, REQUESTS.value, ROWS.value, rates, batches, prompt, new)
        setup = serving_cases.Setup(torch, transformers, llm, peer, name, *sizes)
        yield from serving_cases.CASES[case](setup)
    else:
        for batch in batches:
            found = generation_cases.speeds(torch, llm, peer, case, batch, prompt, new, repeats)
            yield record(f"{case}/{name}/batch{batch}", found["ours"], found["peer"])


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    name = PEER.value or PEERS[CASE.value][0]
    if name not in (known := PEERS[CASE.value]):
        raise ValueError(f"--peer={name}: expected one of {known} with --case={CASE.value}")
    if MESH.value and CASE.value != "train":
        raise ValueError(
            f"--mesh={MESH.value}: only --case=train has more than one device; leave it out"
        )
    try:  # here, so that --help needs neither
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(f'{error}; pip install "llm_jax[test]" (torch, transformers)') from error
    for found in records(CASE.value, torch, transformers, name):
        line = "  ".join(f"{key} {value}" for key, value in found.items())
        print(json.dumps(found) if JSON.value else line, flush=True)
    if EXPLAIN.value:
        print(*explain(), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
