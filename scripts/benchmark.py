"""Speed against a peer on the same weights, interleaved in one process: medians and their ratio.

    python scripts/benchmark.py --case=decode --peer=transformers --shape=gpt2 --batch=1,8,32
    python scripts/benchmark.py --case=prefill --peer=transformers --shape=llama160m --prompt_tokens=512
    python scripts/benchmark.py --case=bandwidth
    python scripts/benchmark.py --case=train --peer=torch --shape=gpt2          # or torch_compile

Greedy, random weights in float32. decode: tokens per second of all rows, prefill left out. prefill:
prompt tokens per second to the first token. bandwidth: what part of the machine's memory bandwidth a
decode step of one row reaches. train: tokens per second of optimizer steps. --json prints
{case, ours, peer, ratio, unit} a line.
"""

import functools
import json

import numpy as np
from absl import app, flags

from llm_jax import SamplingParams, cli
from llm_jax.bench.cost import decode_bytes, read_bandwidth
from llm_jax.bench.peers import SHAPES, generate_seconds, random_model, same_weights
from llm_jax.bench.timing import interleaved
from llm_jax.bench.training import TRAIN_SHAPES, rivals

PEERS = {case: ("transformers",) for case in ("decode", "prefill", "bandwidth")}
PEERS["train"] = ("torch", "torch_compile")
CASE = flags.DEFINE_enum("case", "decode", PEERS, "What to measure.")
PEER = flags.DEFINE_string("peer", None, "Whom to compare with; the default is the case's first.")
SHAPE = flags.DEFINE_enum("shape", "gpt2", sorted({*SHAPES, *TRAIN_SHAPES}), "Size of the model.")
BATCH = flags.DEFINE_list("batch", ["1"], "Rows; several may be given.")
PROMPT = flags.DEFINE_integer("prompt_tokens", None, "Prompt length; default 32, prefill 512.")
NEW = flags.DEFINE_integer("new_tokens", 64, "Tokens to decode.", lower_bound=2)
MESH = flags.DEFINE_string("mesh", "", "Our devices with --case=train, such as data:2; '' = one.")
STEPS = flags.DEFINE_integer("steps", 5, "Training steps in a round.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 5, "Rounds; the medians are reported.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "One JSON object a line on stdout, nothing else.")


def measure(case, llm, peer_seconds, batch, prompt_tokens, new_tokens):
    """Medians of both, in tokens per second; peer_seconds(prompts, new tokens) times the peer."""
    ids = np.random.default_rng(0).integers(5, 30000, (batch, prompt_tokens))
    new = 1 if case == "prefill" else new_tokens
    request = SamplingParams(max_new_tokens=new, temperature=0, ignore_eos=True)

    def ours():
        llm.generate(ids.tolist(), request)
        speed = batch * prompt_tokens / llm.stats.ttft_s
        return speed if case == "prefill" else llm.stats.decode_tokens_per_s

    def theirs():
        first = peer_seconds(ids, 1)
        if case == "prefill":
            return batch * prompt_tokens / first
        return batch * (new - 1) / (peer_seconds(ids, new) - first)

    return interleaved({"ours": ours, "peer": theirs}, REPEATS.value)


def report(case, ours, peer, unit):
    """One line of result."""
    numbers = {"ours": round(ours, 2), "peer": round(peer, 2), "ratio": round(ours / peer, 3)}
    record = {"case": case, **numbers, "unit": unit}
    line = f"{case:44} ours {ours:9.1f}  peer {peer:9.1f}  {unit}  ratio {ours / peer:.2f}"
    print(json.dumps(record) if JSON.value else line, flush=True)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    name = PEER.value or PEERS[CASE.value][0]
    if name not in (known := PEERS[CASE.value]):
        raise ValueError(f"--peer={name}: expected one of {known} with --case={CASE.value}")
    if MESH.value and CASE.value != "train":
        raise ValueError(f"--mesh={MESH.value}: --case={CASE.value} runs on one device; leave it out")
    try:  # here, so that --help needs neither
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(f'{error}; pip install "llm_jax[test]" (torch, transformers)') from error
    if CASE.value == "train":
        options = {"compiled": name == "torch_compile", "steps": STEPS.value, "mesh": MESH.value}
        speeds = interleaved(rivals(torch, SHAPE.value, **options), REPEATS.value)
        return report(f"train/{SHAPE.value}/{name}", speeds["ours"], speeds["peer"], "tokens/s")
    peer = random_model(transformers, SHAPE.value)
    llm, peer_seconds = same_weights(peer), functools.partial(generate_seconds, torch, peer)
    prompt_tokens = PROMPT.value or (512 if CASE.value == "prefill" else 32)
    if CASE.value == "bandwidth":
        speeds = measure("decode", llm, peer_seconds, 1, prompt_tokens, NEW.value)
        needed = decode_bytes(llm.model, 1, prompt_tokens + NEW.value // 2)
        machine = read_bandwidth() / 1e9
        return report(f"bandwidth/{SHAPE.value}/batch1", needed * speeds["ours"] / 1e9, machine, "GB/s")
    for batch in map(int, BATCH.value):
        speeds = measure(CASE.value, llm, peer_seconds, batch, prompt_tokens, NEW.value)
        report(f"{CASE.value}/{SHAPE.value}/batch{batch}", speeds["ours"], speeds["peer"], "tokens/s")


if __name__ == "__main__":
    cli.run(main)
