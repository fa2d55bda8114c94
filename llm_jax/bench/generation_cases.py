"""A fixed batch beside other runtimes: records {case, ours, peer, ratio, unit}, medians of rounds."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from llm_jax.bench import runtimes
from llm_jax.bench.cost import copy_bandwidth, decode_bytes, prefill_flops, read_bandwidth
from llm_jax.bench.peers import STATIC, Generate, generator
from llm_jax.bench.setup import Setup, cores, ran_on, record, skipped
from llm_jax.bench.timing import interleaved
from llm_jax.infer.llm import LLM
from llm_jax.ops.sampling_params import SamplingParams
from llm_jax.train.speed import PEAK_FLOPS


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
            of = f"{case}/{setup.name}/batch{batch}" + (f"/{name}" if name != "transformers" else "")
            more = ran_on(setup.torch)
            if name in runtimes.RUNTIMES:
                more |= {"peer_threads": cores()}
            told = _utilization if case == "prefill" else _traffic
            more |= told(setup, batch, {"our": found["ours"], "peer": found[name]})
            yield record(of, found["ours"], found[name], **more)


def _utilization(setup: Setup, batch: int, speeds: dict[str, float]) -> dict[str, float]:
    """Of prompts read at so many tokens/s: operations a second, and their share of the bfloat16 peak."""
    per_token = prefill_flops(setup.llm.model, batch, setup.prompt_tokens) / batch / setup.prompt_tokens
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind) if setup.dtype == "bfloat16" else None
    found = {f"{who}_tflops_per_s": speed * per_token / 1e12 for who, speed in speeds.items()}
    if peak:
        found |= {f"{who}_mfu": speed * per_token / peak for who, speed in speeds.items()}
    return {name: round(value, 3) for name, value in found.items()}


def _traffic(setup: Setup, batch: int, speeds: dict[str, float]) -> dict[str, float]:
    """Of steps that make so many tokens/s: what they must read at least, in GB/s."""
    context = setup.prompt_tokens + setup.new_tokens // 2
    per_token = decode_bytes(setup.llm.model, batch, context) / batch
    return {f"{who}_gb_per_s": round(speed * per_token / 1e9, 2) for who, speed in speeds.items()}


def _generator(setup: Setup, name: str) -> Generate:
    """How a peer generates. Raises what `runtimes.load` does."""
    if name not in runtimes.RUNTIMES:
        return generator(setup.torch, setup.peer, static=name == STATIC)
    if setup.dtype != "float32" or jax.default_backend() == "gpu":
        raise RuntimeError(f"{name} is compared in float32 on a CPU alone")
    sizes = {"rows": max(setup.batches), "length": setup.prompt_tokens + setup.new_tokens}
    return runtimes.load(name, setup.transformers, setup.peer, **sizes, threads=cores())


def bandwidth(setup: Setup) -> Iterator[dict[str, Any]]:
    """What part of the memory's bandwidth a decode step of one row reaches.

    Of a CPU that is how fast it reads, of other devices how fast they copy, both directions counted.
    """
    sizes = (setup.prompt_tokens, setup.new_tokens, setup.repeats)
    found = speeds(setup.llm, {}, "decode", 1, *sizes)
    needed = decode_bytes(setup.llm.model, 1, setup.prompt_tokens + setup.new_tokens // 2)
    how = "reading" if jax.default_backend() == "cpu" else "copying"
    memory = (read_bandwidth if how == "reading" else copy_bandwidth)() / 1e9
    more = {"peer_is": how} | ran_on(setup.torch)
    yield record(f"bandwidth/{setup.name}/batch1", needed * found["ours"] / 1e9, memory, "GB/s", **more)


CASES = {"decode": decode, "prefill": prefill, "bandwidth": bandwidth}
