"""Prefixes that were forgotten on the device come back from the host, and change no token."""

import functools

import jax
import pytest

from llm_jax import LLM, Engine, EngineConfig, SamplingParams
from llm_jax.config import ModelConfig
from llm_jax.models import describe, init_params
from llm_jax.sharding import make_mesh

SLOW = pytest.mark.slow
VOCAB = 64
ASKED = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
PREFIXES = [[(7 * i + j) % 50 + 5 for j in range(32)] for i in range(4)]
PROMPTS = [[*prefix, 60, tail] for tail in (1, 2) for prefix in PREFIXES]  # each prefix two times
MIXED, FEW = (16, 0), (9, 11)  # windows of two layers; pages for little more than one prompt
SIZES = {"max_rows": 1, "token_budget": 48, "max_length": 48, "page_size": 8, "compile_ahead": False}


@functools.cache
def made(windows=(), mesh="data:1"):
    """A small random model; windows: of its two layers."""
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 64, "max_positions": 48}
    model = describe(ModelConfig("llama", VOCAB, 2, 32, windows=windows, **sizes))
    params = init_params(model, make_mesh(mesh), jax.random.key(0))
    return LLM.from_params(model, params, None, mesh=mesh)


def served(llm, **changes):
    """(outputs, the engine) of all prompts; nothing is left of them but what is idle."""
    engine = Engine(llm, EngineConfig(**(SIZES | changes)))
    outputs = engine.generate(PROMPTS, ASKED)
    for scheduler in engine.schedulers:
        load = scheduler.load()
        assert engine.idle and load.free_pages == load.total_pages
        assert set(load.free_host_pages) == {engine.config.host_pages + engine.config.prefix_host_pages}
    return outputs, engine


def tokens(outputs):
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize(
    ("windows", "pages", "changes"),
    [
        (MIXED, FEW, {}),
        pytest.param((), (11,), {}, marks=SLOW),
        pytest.param((16, 16), (9,), {}, marks=SLOW),
        pytest.param((), (13,), {"max_rows": 2, "token_budget": 32}, marks=SLOW),
        pytest.param((), (10,), {"max_rows": 2, "preemption": "offload", "host_pages": 4}, marks=SLOW),
    ],
)
def test_the_same_tokens_with_few_pages(windows, pages, changes):
    outputs, engine = served(made(windows), pages=pages, prefix_host_pages=40, **changes)
    assert tokens(outputs) == tokens(made(windows).generate(PROMPTS, ASKED))
    counts = engine.schedulers[0].prefix.statistics
    assert counts.host_hit_tokens > 0 and counts.dropped == 0
    assert engine.schedulers[0].statistics.host_hit_tokens == counts.host_hit_tokens


def test_a_small_host_forgets():
    outputs, engine = served(made(MIXED), pages=FEW, prefix_host_pages=10)
    assert tokens(outputs) == tokens(made(MIXED).generate(PROMPTS, ASKED))
    counts = engine.schedulers[0].prefix.statistics
    assert counts.dropped > 0 < counts.restored


def test_an_int8_cache_takes_its_scales_along():
    outputs, engine = served(made(MIXED), pages=FEW, prefix_host_pages=40, cache_dtype="int8")
    wanted, alone = served(made(MIXED), pages=FEW, cache_dtype="int8")
    assert tokens(outputs) == tokens(wanted)
    hits = [x.schedulers[0].prefix.statistics.host_hit_tokens for x in (engine, alone)]
    assert hits == [4 * 32, 0], "all that comes a second time"


@SLOW
@pytest.mark.parametrize("mesh", ["data:2", "data:2,tensor:2"])
def test_meshes(mesh):
    outputs, engine = served(made(mesh=mesh), pages=(8,), prefix_host_pages=40)
    assert tokens(outputs) == tokens(made().generate(PROMPTS, ASKED))
    assert all(s.prefix.statistics.host_hit_tokens > 0 for s in engine.schedulers)
