"""Traffic: many requests of unequal length, and how fast an engine and others answer them.

The usual figures of the field: TTFT, the time to a request's first token; TPOT, its time per token after
that; ITL, the time between two tokens; all by percentiles, beside requests and tokens per second.
"""

import dataclasses
import time
from types import ModuleType
from typing import Any

import numpy as np

from llm_jax.engine.engine import Engine
from llm_jax.engine.scheduler import QueueFull
from llm_jax.ops.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Requests: prompts, how many tokens each wants, and when each comes (seconds)."""

    prompts: list[list[int]]
    new_tokens: list[int]
    arrivals: list[float]


def mixed(count: int, vocab_size: int, seed: int = 0, rate: float = 0.0, prefix: int = 0) -> Traffic:
    """`count` requests of 16 to 512 prompt tokens and 16 to 256 new ones, evenly drawn.

    rate: of arrivals per second, a Poisson process; 0 = all come at once. prefix: tokens that all
    prompts begin with, and 32 of their own after it.
    """
    rng = np.random.default_rng(seed)
    common = rng.integers(5, vocab_size, prefix).tolist()
    lengths = [32] * count if prefix else rng.integers(16, 513, count).tolist()
    prompts = [common + rng.integers(5, vocab_size, n).tolist() for n in lengths]
    gaps = rng.exponential(1 / rate, count) if rate else np.zeros(count)
    return Traffic(prompts, rng.integers(16, 257, count).tolist(), np.cumsum(gaps).tolist())


@dataclasses.dataclass
class Times:
    """When each request got each of its tokens, seconds since it came."""

    tokens: list[list[float]]
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        """Of all requests together."""
        return sum(map(len, self.tokens)) / self.total_s

    def table(self) -> dict[str, float]:
        """The usual figures, milliseconds where they are times."""
        first = [1e3 * t[0] for t in self.tokens]
        per_token = [1e3 * (t[-1] - t[0]) / (len(t) - 1) for t in self.tokens if len(t) > 1]
        between = [1e3 * gap for t in self.tokens for gap in np.diff(t)]
        figures = {
            "requests_per_s": len(self.tokens) / self.total_s,
            "tokens_per_s": self.tokens_per_s,
        }
        for name, values in {"ttft": first, "tpot": per_token, "itl": between}.items():
            for percent in (50, 99):
                figures[f"{name}_p{percent}_ms"] = float(np.percentile(values, percent))
        return figures


def serve(engine: Engine, traffic: Traffic) -> Times:
    """Answer the traffic, greedily and to the last token."""
    times: dict[str, list[float]] = {}
    began, next_one = time.perf_counter(), 0
    now = lambda: time.perf_counter() - began  # noqa: E731
    while next_one < len(traffic.prompts) or not engine.idle:
        while next_one < len(traffic.prompts) and traffic.arrivals[next_one] <= now():
            params = SamplingParams(
                max_new_tokens=traffic.new_tokens[next_one], temperature=0, ignore_eos=True
            )
            try:
                times[engine.add(traffic.prompts[next_one], params)] = []
            except QueueFull:
                break
            next_one += 1
        if engine.idle:
            time.sleep(max(0.0, traffic.arrivals[next_one] - now()))
            continue
        for delta in engine.step():
            times[delta.id] += [now()] * len(delta.token_ids)
    total = now()
    came = traffic.arrivals
    return Times([[t - came[i] for t in each] for i, each in enumerate(times.values())], total)


def static_batches(torch: ModuleType, peer: Any, traffic: Traffic, batch: int) -> float:
    """Seconds of transformers' `generate` for all requests, sorted by length, padded, in batches."""
    order = sorted(
        range(len(traffic.prompts)), key=lambda i: (traffic.new_tokens[i], len(traffic.prompts[i]))
    )
    start = time.perf_counter()
    with torch.no_grad():
        for first in range(0, len(order), batch):
            part = order[first : first + batch]
            longest = max(len(traffic.prompts[i]) for i in part)
            ids, mask = np.zeros((2, len(part), longest), np.int64)
            for row, i in enumerate(part):
                ids[row, longest - len(traffic.prompts[i]) :] = traffic.prompts[i]
                mask[row, longest - len(traffic.prompts[i]) :] = 1
            new = max(traffic.new_tokens[i] for i in part)
            peer.generate(
                torch.tensor(ids, device=peer.device),
                attention_mask=torch.tensor(mask, device=peer.device),
                min_new_tokens=new,
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
    return time.perf_counter() - start


def continuous_batches(transformers: ModuleType, peer: Any, traffic: Traffic) -> float:
    """Seconds of transformers' own continuous batching (`generate_batch`) for all requests."""
    longest = max(traffic.new_tokens)
    config = transformers.GenerationConfig(
        max_new_tokens=longest, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    start = time.perf_counter()
    with peer.continuous_batching_context_manager(generation_config=config) as manager:
        for prompt, new in zip(traffic.prompts, traffic.new_tokens, strict=True):
            manager.add_request(prompt, max_new_tokens=new)
        done = 0
        while done < len(traffic.prompts):
            result = manager.get_result(timeout=5)
            done += result is not None and result.is_finished()
    return time.perf_counter() - start
