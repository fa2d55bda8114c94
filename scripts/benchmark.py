"""Speed against a peer on the same weights, in turns in one process: medians and their ratio.

    python scripts/benchmark.py --case=decode --shape=gpt2 --batch=1,8,32     # or prefill, or bandwidth
    python scripts/benchmark.py --shape=llama160m --batch=8 --peer=transformers,ctranslate2,llama_cpp
    python scripts/benchmark.py --shape=llama3_8b --dtype=bfloat16 --peer=transformers_static   # a GPU
    python scripts/benchmark.py --case=train --peer=torch --shape=gpt2          # or torch_compile
    python scripts/benchmark.py --case=mixed_traffic --requests=64   # or prefix, speculation, overhead
    python scripts/benchmark.py --case=arrivals --rates=0.2,0.5,1 --plot=arrivals.png
    python scripts/benchmark.py --case=drafters --draft_head=runs/draft_head/draft_head

Greedy, random weights (drafters: the demo model). decode: tokens a second of all rows after prefill.
bandwidth: what part of the machine's a decode step of one row reaches. The engine's are mixed_traffic
beside transformers' batches, overhead beside a fixed batch, arrivals, and others beside itself without.
"""

import os
import sys
from collections.abc import Iterator

from absl import app, flags

from llm_jax import LLM, cli
from llm_jax.bench.cases import CASES, OF_CASE, PEERS, check_flags
from llm_jax.bench.drafting import drafters
from llm_jax.bench.peers import SHAPES, random_model, same_weights
from llm_jax.bench.setup import Setup, ran_on, record
from llm_jax.bench.timing import interleaved
from llm_jax.bench.training import TRAIN_SHAPES, rivals
from llm_jax.kernels.forms import explain

_int, _str, _bool = flags.DEFINE_integer, flags.DEFINE_string, flags.DEFINE_bool
CASE = flags.DEFINE_enum("case", "decode", PEERS, "What to measure.")
flags.DEFINE_list("peer", [], "Whom to compare with; several for decode. Default: the case's first.")
SHAPE = flags.DEFINE_enum("shape", "gpt2", sorted({*SHAPES, *TRAIN_SHAPES}), "Size of the model.")
BATCH = flags.DEFINE_list("batch", ["1"], "Rows; several may be given.")
PROMPT = _int("prompt_tokens", None, "Prompt length; default 32, prefill 512.", lower_bound=1)
_int("new_tokens", 64, "Tokens to decode.", lower_bound=2)
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of both sides; default float32.")
_str("weights", "", "Ours: a dtype, int8 or w8a8; default --dtype.")
_str("mesh", "", "Our devices with --case=train, such as data:2; '' = one.")
_int("steps", 5, "Training steps in a round.", lower_bound=1)
_int("requests", 64, "Of mixed_traffic, arrivals and prefix.", lower_bound=1)
_int("max_rows", 32, "Rows of the engine, and of the peer's batches.", lower_bound=1)
RATES = flags.DEFINE_list("rates", ["0.25", "0.5", "1"], "Requests a second.")
flags.DEFINE_float("ttft_bound_s", 10.0, "Of the P99 of TTFT up to the knee of arrivals.", 0.0)
_str("plot", None, "A PNG file to draw arrivals in.")
_str("draft_head", None, "Of drafters: the directory of a head of the demo model.")
_str("draft_model", None, "Of drafters: that of a smaller model with the demo model's tokens.")
_int("repeats", 5, "Rounds; the medians are reported.", lower_bound=1)
_bool("json", False, "One JSON object a line on stdout, nothing else.")
_bool("explain", False, "Tell which form of each operator ran, on stderr.")
FLAGS, SIZES = flags.FLAGS, ("repeats", "requests", "max_rows", "ttft_bound_s", "plot", "new_tokens")


def records(case, torch, transformers, peers) -> Iterator[dict]:
    """What the case finds."""
    if case == "train":
        options = {"compiled": "torch_compile" in peers, "steps": FLAGS.steps, "mesh": FLAGS.mesh}
        found = interleaved(rivals(torch, SHAPE.value, **options), FLAGS.repeats)
        yield record(f"train/{SHAPE.value}/{peers[0]}", *found.values(), **ran_on(torch))
    elif case == "drafters":
        yield from drafters(LLM(), FLAGS.draft_head, FLAGS.draft_model, FLAGS.new_tokens, FLAGS.repeats)
    else:
        dtype = FLAGS.dtype or "float32"
        peer = random_model(torch, transformers, SHAPE.value, dtype)
        sizes: dict = {name: FLAGS[name].value for name in SIZES} | {"rates": [*map(float, RATES.value)]}
        sizes["batches"] = [*map(int, BATCH.value)]
        sizes["prompt_tokens"] = PROMPT.value or (512 if case == "prefill" else 32)
        name = "_".join(filter(None, (SHAPE.value, FLAGS.dtype, FLAGS.weights)))
        llm = same_weights(peer, FLAGS.weights, dtype)
        sides = (torch, transformers, llm, peer, name, dtype, peers)
        yield from CASES[case](Setup(*sides, **sizes))


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    case, peers = CASE.value, FLAGS.peer or [PEERS[CASE.value][0]]
    check_flags(case, peers, {name: FLAGS[name].value for name in OF_CASE})
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU has room for both sides
    try:  # --help needs neither
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(f'{error}; pip install "llm_jax[test]" (torch, transformers)') from error
    for each in records(case, torch, transformers, peers):
        cli.show(each, as_json=FLAGS.json)
    if FLAGS.explain:
        print(*explain(), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, huge_pages=True)
