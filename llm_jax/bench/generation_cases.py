"""A fixed batch beside other runtimes: records {case, ours, peer, ratio, unit}, medians of rounds."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from llm_jax.bench import runtimes
from llm_jax.bench.cost import decode_bytes, read_bandwidth
from llm_jax.bench.peers import Generate, generator
from llm_jax.bench.setup import Setup, cores, record, skipped, threads
from llm_jax.bench.timing import interleaved
from llm_jax.infer.llm import LLM
from llm_jax.ops.sampling_params import SamplingParams


def speeds(
    llm: LLM,
    peers: Mapping[str, Generate],
    case: str,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
) -> dict[str, float]:
    """Tokens per second of "ours" and of each peer, greedy: of the prompts ("prefill") or after them."""
    ids = np.random.default_rng(0).integers(5, llm.model.config.vocab_size, (batch, prompt_tokens))
    new = 1 if case == "prefill" else new_tokens
    request = SamplingParams(max_new_tokens=new, temperature=0, ignore_eos=True)

    def ours():
        llm.generate(ids.tolist(), request)
        speed = batch * prompt_tokens / llm.stats.ttft_s
        return speed if case == "prefill" else llm.stats.decode_tokens_per_s

    def theirs(generate):
        first = _seconds(generate, ids, 1)
        if case == "prefill":
            return batch * prompt_tokens / first
        return batch * (new - 1) / (_seconds(generate, ids, new) - first)

    rivals = {name: lambda generate=generate: theirs(generate) for name, generate in peers.items()}
    return interleaved({"ours": ours, **rivals}, repeats)


def _seconds(generate: Generate, ids: np.ndarray, new_tokens: int) -> float:
    start = time.perf_counter()
    generate(ids, new_tokens)
    return time.perf_counter() - start


def decode(setup: Setup) -> Iterator[dict[str, Any]]:
    """Tokens per second of all rows after their prompts."""
    yield from _beside_peers(setup, "decode")


def prefill(setup: Setup) -> Iterator[dict[str, Any]]:
    """Tokens per second of the prompts, to the first new token."""
    yield from _beside_peers(setup, "prefill")


def _beside_peers(setup: Setup, case: str) -> Iterator[dict[str, Any]]:
    """All of `setup.peers` that run here, in turns with ours; a record for those that do not, too."""
    peers: dict[str, Generate] = {}
    for name in setup.peers:
        try:
            peers[name] = _generator(setup, name)
        except (ImportError, OSError, RuntimeError) as error:  # not installed, or not for this machine
            yield skipped(f"{case}/{setup.name}/{name}", error)
    sizes = (setup.prompt_tokens, setup.new_tokens, setup.repeats)
    for batch in setup.batches if peers else ():
        found = speeds(setup.llm, peers, case, batch, *sizes)
        for name in peers:
            of = f"{case}/{setup.name}/batch{batch}"
            both = threads(setup.torch)
            if name in runtimes.RUNTIMES:
                of, both = f"{of}/{name}", both | {"peer_threads": cores()}
            yield record(of, found["ours"], found[name], **both)


def _generator(setup: Setup, name: str) -> Generate:
    """How a peer generates. Raises what `runtimes.load` does."""
    if name not in runtimes.RUNTIMES:
        return generator(setup.torch, setup.peer)
    sizes = {"rows": max(setup.batches), "length": setup.prompt_tokens + setup.new_tokens}
    return runtimes.load(name, setup.transformers, setup.peer, **sizes, threads=cores())


def bandwidth(setup: Setup) -> Iterator[dict[str, Any]]:
    """What part of the machine's memory bandwidth a decode step of one row reaches."""
    sizes = (setup.prompt_tokens, setup.new_tokens, setup.repeats)
    found = speeds(setup.llm, {}, "decode", 1, *sizes)
    needed = decode_bytes(setup.llm.model, 1, setup.prompt_tokens + setup.new_tokens // 2)
    machine = read_bandwidth() / 1e9
    case = f"bandwidth/{setup.name}/batch1"
    yield record(case, needed * found["ours"] / 1e9, machine, "GB/s", our_threads=cores())


CASES = {"decode": decode, "prefill": prefill, "bandwidth": bandwidth}
