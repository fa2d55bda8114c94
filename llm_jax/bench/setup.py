"""What the cases of scripts/benchmark.py are given, and the records that they give."""

import dataclasses
import os
from types import ModuleType
from typing import Any

import jax

from llm_jax.infer.llm import LLM


@dataclasses.dataclass(frozen=True)
class Setup:
    """Both sides of a comparison, and its sizes; a case takes those that it has use for."""

    torch: ModuleType
    transformers: ModuleType
    llm: LLM
    peer: Any  # the same weights in transformers
    name: str  # of the shape
    dtype: str  # of both sides
    peers: list[str]  # of decode and prefill: transformers, `peers.STATIC`, or of `runtimes.RUNTIMES`
    repeats: int
    requests: int  # of mixed_traffic, arrivals, prefix
    max_rows: int  # of the engine and of the peer's batches, likewise
    rates: list[float]  # of arrivals, requests a second
    ttft_bound_s: float  # of arrivals, for the knee
    plot: str | None  # of arrivals: a PNG file
    batches: list[int]  # of decode, prefill and overhead
    prompt_tokens: int  # of these and of bandwidth
    new_tokens: int  # of these and of speculation


def record(case: str, ours: float, peer: float, unit: str = "tokens/s", **more: Any) -> dict[str, Any]:
    """One result."""
    numbers = {"ours": round(ours, 2), "peer": round(peer, 2), "ratio": round(ours / peer, 3)}
    return {"case": case, **numbers, "unit": unit, **more}


def skipped(case: str, error: Exception) -> dict[str, Any]:
    """In place of a result: why a peer does not run here."""
    return {"case": case, "skipped": f"{type(error).__name__}: {error}"}


def cores() -> int:
    """Those that this process may use: XLA takes a thread for each."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS, which binds no process to cores


def ran_on(torch: ModuleType) -> dict[str, Any]:
    """What both sides of a comparison with PyTorch run on: the GPU, or threads of the CPU."""
    if jax.default_backend() == "gpu":
        return {"device": jax.devices()[0].device_kind}
    return {"our_threads": cores(), "peer_threads": torch.get_num_threads()}
