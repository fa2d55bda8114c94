"""Every field of SamplingParams and of EngineConfig changes what the engine does."""

import dataclasses
import functools
import re
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import SamplingParams
from llm_jax.config import EngineConfig
from llm_jax.engine import engine as engine_module
from llm_jax.engine.engine import Engine
from llm_jax.engine.scheduler import QueueFull
from llm_jax.engine.trace import read_trace, replay
from llm_jax.ops.sampling_params import StructuredSpec
from tests.infer.test_sampling_fields import CASES, GREEDY, PROMPTS, SEEDED, llm

SIZES = {"max_rows": 4, "token_budget": 32, "max_length": 64, "page_size": 16, "compile_ahead": False}
LONG = list(range(5, 53))  # 48 tokens


def made(**changes):
    return Engine(llm(), EngineConfig(**(SIZES | {"prompt_logprobs": True} | changes)))


@functools.cache
def one():
    return made(max_rows=8)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(SamplingParams)])
def test_every_field_of_a_request_counts(field):
    if field == "structured":
        (output,) = one().generate(
            ["a"], SamplingParams(**SEEDED, structured=StructuredSpec("regex", "[xyz]{3}"))
        )
        assert re.fullmatch("[xyz]{3}", output.text)
        return
    request, value = CASES[field]()
    results = []
    for asked in (request, request | {field: value}):
        ours, theirs = (x.generate(PROMPTS, SamplingParams(**asked)) for x in (one(), llm()))
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine.token_ids, mine.text, mine.sample) == (
                other.token_ids,
                other.text,
                other.sample,
            )
            assert mine.finish_reason == other.finish_reason
            for name in ("logprobs", "prompt_logprobs"):
                a, b = getattr(mine, name), getattr(other, name)
                assert (a is None) == (b is None), name
                if a is not None:
                    np.testing.assert_allclose(np.array(a, float), np.array(b, float), atol=1e-5)
        results.append(ours)
    assert results[0] != results[1]


def statistics(asked=GREEDY, prompts=(LONG, LONG), **changes):
    """What the scheduler counted while it served two long prompts, one after the other."""
    serving = made(**changes)
    for prompt in prompts:
        serving.generate([prompt], SamplingParams(**asked))
    return serving.schedulers[0].statistics


def refused(error, message, prompts=(LONG,), **changes):
    serving = made(**changes)
    with pytest.raises(error, match=message):
        for prompt in prompts:
            serving.add(prompt, SamplingParams(**GREEDY))


def most_at_once(rows):
    serving, most = made(max_rows=rows), 0
    for _ in range(5):
        serving.add("abc", SamplingParams(**GREEDY))
    while not serving.idle:
        serving.step()
        most = max(most, serving.schedulers[0].load().running)
    return most


def pages(**changes):
    return made(**changes).schedulers[0].load().total_pages[0]


def memory_share(monkeypatch):
    monkeypatch.setattr(engine_module, "free_bytes", lambda device: 1 << 19)
    assert pages(memory_share=0.05) < pages(memory_share=0.06)


def aging(monkeypatch):
    def ranks(aging_s):
        now = iter(range(0, 10**6, 100))
        serving = Engine(llm(), EngineConfig(**SIZES, aging_s=aging_s), clock=lambda: next(now))
        early = serving.add("a", SamplingParams(**GREEDY), priority=0)
        serving.add("b", SamplingParams(**GREEDY), priority=5)
        return serving.schedulers[0].waiting[0].request.id == early

    assert ranks(10.0) and not ranks(1e9)


def overlap(monkeypatch):
    def in_flight(overlap):
        serving = made(overlap=overlap)
        serving.add("a", SamplingParams(**GREEDY))
        serving.step()
        return len(serving._flights)

    assert in_flight(True) == 1 and in_flight(False) == 0


def preemption(monkeypatch):
    few = {"page_size": 8, "pages": (9,), "prefix_cache": False, "max_length": 56}

    def counts(**changes):
        serving = made(**few, **changes)
        serving.generate(
            [LONG[:20]] * 4, SamplingParams(**(GREEDY | {"max_new_tokens": 20, "ignore_eos": True}))
        )
        return serving.schedulers[0].statistics

    assert counts().offloads == 0 < counts().preemptions
    assert counts(preemption="offload", host_pages=8).offloads > 0


def prefix_host_pages(monkeypatch):
    few = {"pages": (5,), "prompts": (LONG, LONG[::-1], LONG)}
    assert (
        statistics(**few).host_hit_tokens == 0 < statistics(**few, prefix_host_pages=9).host_hit_tokens
    )
    with pytest.raises(ValueError, match="prefix_host_pages=9 with prefix_cache=False"):
        made(prefix_host_pages=9, prefix_cache=False)


def speculation(monkeypatch):
    asked = GREEDY | {"max_new_tokens": 15, "logit_bias": {7: 100.0}}  # the same token on and on
    plain = statistics(asked, speculation="off")
    few, many = (statistics(asked, speculation="prompt_lookup", draft_tokens=n) for n in (1, 4))
    assert plain.steps > few.steps > many.steps


def strict(monkeypatch):
    calls = []
    make = engine_module.Programs._compile
    monkeypatch.setattr(
        engine_module.Programs,
        "_compile",
        lambda self, key: (calls.append(self._config.strict_numerics), make(self, key)),
    )
    asked = SamplingParams(**GREEDY, logprobs=0)
    found = [made(strict_numerics=s).generate(["abc"], asked)[0] for s in (False, True)]
    assert found[0].token_ids == found[1].token_ids and set(calls) == {False, True}


def prompt_logprobs(monkeypatch):
    with pytest.raises(ValueError, match="this engine was not made for it"):
        made(prompt_logprobs=False).add("a", SamplingParams(max_new_tokens=3, prompt_logprobs=1))


def trace(monkeypatch):
    """What an engine records is repeated to the last decision, with pages short and drafts."""
    few = {"page_size": 8, "pages": (9,), "max_length": 56, "speculation": "prompt_lookup"}
    asked = SamplingParams(**(GREEDY | {"max_new_tokens": 20, "ignore_eos": True, "n": 2}))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "new" / "trace.jsonl"
        serving = made(trace=str(path), **few)
        serving.generate([LONG[:20]] * 4, asked)
        assert serving.schedulers[0].statistics.preemptions > 0
        assert replay(read_trace(path)) is None, "the first call with another answer"
    with pytest.raises(ValueError, match="trace='x' with adapters=2"):
        EngineConfig(trace="x", adapters=2)


def seeds(monkeypatch):
    asked = SamplingParams(max_new_tokens=12)
    first, again, other = (made(seed=seed).generate(["abc"], asked)[0].token_ids for seed in (0, 0, 1))
    assert first == again != other


CHECKS = {
    "max_rows": lambda _: (most_at_once(2), most_at_once(4)) == (2, 4),
    "token_budget": lambda _: statistics(token_budget=19).steps > statistics(token_budget=64).steps,
    "max_length": lambda _: refused(ValueError, "max_length=32", max_length=32),
    "page_size": lambda _: made(page_size=8).runner.caches[0].page_size == 8,
    "pages": lambda _: pages(pages=(21,)) == 20,
    "memory_share": memory_share,
    "cache_dtype": lambda _: made(cache_dtype="int8").runner.caches[0].pools[0].tokens.dtype == jnp.int8,
    "max_queue": lambda _: refused(QueueFull, "max_queue=1", (LONG, LONG), max_queue=1),
    "prefix_cache": lambda _: statistics().hit_tokens > statistics(prefix_cache=False).hit_tokens == 0,
    "preemption": preemption,
    "host_pages": preemption,
    "prefix_host_pages": prefix_host_pages,
    "aging_s": aging,
    "overlap": overlap,
    "speculation": speculation,
    "draft_tokens": speculation,
    "prompt_logprobs": prompt_logprobs,
    "strict_numerics": strict,
    "compile_ahead": lambda _: len(made(compile_ahead=True, max_rows=1).runner.programs._compiled) > 5,
    "trace": trace,
    "seed": seeds,
}
ELSEWHERE = {"adapters", "adapter_rank", "adapter_targets", "max_beams"}  # test_{adapters,beams}.py


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(EngineConfig)])
def test_every_setting_of_an_engine_counts(field, monkeypatch):
    assert (field in CHECKS) != (field in ELSEWHERE), f"EngineConfig.{field}: give it a case"
    assert CHECKS.get(field, lambda _: None)(monkeypatch) is not False


def test_settings_out_of_range_are_named():
    for name, value in {
        "max_rows": 0,
        "prefix_host_pages": -1,
        "token_budget": -1,
        "memory_share": 1.5,
        "cache_dtype": "int3",
        "speculation": "magic",
        "pages": (1,),
    }.items():
        with pytest.raises(ValueError, match=name):
            EngineConfig(**{name: value})
    with pytest.raises(ValueError, match="host_pages=4 with preemption='recompute'"):
        made(host_pages=4)
