"""Ways to draft beside none, on a trained model: random weights write what nobody can guess."""

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any

from llm_jax.bench.setup import record
from llm_jax.bench.timing import interleaved
from llm_jax.checkpoint.draft_head import load_draft_head
from llm_jax.config import EngineConfig
from llm_jax.engine.engine import Engine
from llm_jax.infer.llm import LLM
from llm_jax.ops.sampling_params import SamplingParams

PROMPTS = (  # of the demo model's kind
    "我喜欢编程。",
    "今天天气很好，",
    "妈妈说",
    "我每天早上",
    "Once upon a time",
    "I like to",
    "My brother is",
    "Yesterday we went to",
)


def drafters(
    llm: LLM, draft_head: str | None, draft_model: str | None, new_tokens: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """One greedy request after the other, whose texts end by themselves, with each way to draft.

    draft_head: a directory that `load_draft_head` reads; draft_model: one of a smaller model of the
    same tokens; each is left out where it is None.
    """
    drafts_by: dict[str, Any] = {"prompt_lookup": None}
    if draft_head:
        drafts_by["draft_head"] = load_draft_head(draft_head, llm.model, llm.mesh)
    if draft_model:
        drafts_by["draft_model"] = LLM(draft_model)
    # All rounds are alike, so that the first one, which is not counted, compiles what they need.
    config = EngineConfig(max_rows=1, prefix_cache=False, compile_ahead=False)
    engines = {
        way: Engine(llm, dataclasses.replace(config, speculation=way), drafter=drafter)
        for way, drafter in {"off": None, **drafts_by}.items()
    }
    speeds = interleaved(
        {way: functools.partial(_speed, each, new_tokens) for way, each in engines.items()}, repeats
    )
    steps = {way: each.schedulers[0].statistics.steps for way, each in engines.items()}
    for way in drafts_by:
        engine = engines[way]
        figures = {
            "tokens_per_step": round(steps["off"] / steps[way], 2),  # without drafts each step makes one
            "drafted": engine.drafted_tokens,
            "accepted_share": round(engine.accepted_tokens / max(engine.drafted_tokens, 1), 3),
        }
        yield record(f"drafters/{way}", speeds[way], speeds["off"], **figures)


def _speed(engine: Engine, new_tokens: int) -> float:
    """Tokens per second of all prompts, prefill with them."""
    asked = SamplingParams(max_new_tokens=new_tokens, temperature=0)
    start = time.perf_counter()
    made = sum(len(engine.generate([each], asked)[0].token_ids) for each in PROMPTS)
    return made / (time.perf_counter() - start)
