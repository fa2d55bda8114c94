"""A fixed batch beside transformers: records {case, ours, peer, ratio, unit}, medians of rounds."""

import functools
from types import ModuleType
from typing import Any

import numpy as np

from llm_jax.bench.cost import decode_bytes, read_bandwidth
from llm_jax.bench.peers import generate_seconds
from llm_jax.bench.timing import interleaved
from llm_jax.infer.llm import LLM
from llm_jax.ops.sampling_params import SamplingParams


def record(case: str, ours: float, peer: float, unit: str = "tokens/s", **more: Any) -> dict[str, Any]:
    """One result."""
    numbers = {"ours": round(ours, 2), "peer": round(peer, 2), "ratio": round(ours / peer, 3)}
    return {"case": case, **numbers, "unit": unit, **more}


def speeds(
    torch: ModuleType,
    llm: LLM,
    peer: Any,
    case: str,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
) -> dict[str, float]:
    """Tokens per second of "ours" and "peer", greedy: of the prompts ("prefill") or after them."""
    ids = np.random.default_rng(0).integers(5, 30000, (batch, prompt_tokens))
    new = 1 if case == "prefill" else new_tokens
    request = SamplingParams(max_new_tokens=new, temperature=0, ignore_eos=True)
    seconds = functools.partial(generate_seconds, torch, peer, ids)

    def ours():
        llm.generate(ids.tolist(), request)
        speed = batch * prompt_tokens / llm.stats.ttft_s
        return speed if case == "prefill" else llm.stats.decode_tokens_per_s

    def theirs():
        first = seconds(1)
        if case == "prefill":
            return batch * prompt_tokens / first
        return batch * (new - 1) / (seconds(new) - first)

    return interleaved({"ours": ours, "peer": theirs}, repeats)


def bandwidth(torch: ModuleType, llm: LLM, peer: Any, name: str, *sizes: int) -> dict[str, Any]:
    """What part of the machine's memory bandwidth a decode step of one row reaches."""
    prompt_tokens, new_tokens, repeats = sizes
    found = speeds(torch, llm, peer, "decode", 1, prompt_tokens, new_tokens, repeats)
    needed = decode_bytes(llm.model, 1, prompt_tokens + new_tokens // 2)
    machine = read_bandwidth() / 1e9
    return record(f"bandwidth/{name}/batch1", needed * found["ours"] / 1e9, machine, "GB/s")
