"""Drafts of the device: they change no token, and a model drafts for itself without a mistake.

The latter is the sharp test: one wrong page, position or random number on the drafter's side and a draft
is wrong that should have been right.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import LLM, SamplingParams
from llm_jax.checkpoint.hf import load_config, load_hf
from llm_jax.config import EngineConfig
from llm_jax.engine.drafts import ON_DEVICE, PATIENCE, DraftLength
from llm_jax.engine.engine import Engine
from llm_jax.engine.trace import read_trace, replay
from llm_jax.models import describe, init_params
from llm_jax.models.draft_head import describe_draft_head, init_draft_head
from llm_jax.ops.attention import FullContext
from llm_jax.sharding import make_mesh
from tests.tiny import DECODERS

SIZES = {"max_rows": 4, "token_budget": 32, "max_length": 60, "page_size": 8, "compile_ahead": False}
SIZES |= {"speculation": "draft_model", "draft_tokens": 3}
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(5, 97, n).tolist() for n in (3, 40, 11, 25)]
ASKED = [
    SamplingParams(max_new_tokens=16, temperature=0, ignore_eos=True),
    SamplingParams(max_new_tokens=14, temperature=0.9, top_p=0.9, seed=1, ignore_eos=True),
    SamplingParams(max_new_tokens=9, temperature=1.2, seed=2, repetition_penalty=1.3, n=2, logprobs=2),
    SamplingParams(max_new_tokens=16, temperature=0, frequency_penalty=0.5, ignore_eos=True),
]


def load(folder, name, mesh=""):
    """One of the tiny models, without a tokenizer."""
    DECODERS[name].save(folder)
    config = load_config(folder)
    model, mesh = describe(dataclasses.replace(config, cache_dtype="float32")), make_mesh(mesh)
    params = load_hf(folder, model, mesh)
    llm = LLM.from_params(model, params, None, mesh=mesh)
    if mesh.size == 1:
        llm.params = params  # layers that are scanned here too: one of them is compiled, not three
    return llm


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return load(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def expected(llm):
    return [o for p, a in zip(PROMPTS, ASKED, strict=True) for o in llm.generate([p], a)]


def near(llm, noise, **changes):
    """A model of nearly the same weights, or of random ones where the sizes change."""
    config = dataclasses.replace(llm.model.config, **changes)
    if changes:
        model = describe(config)
        params = init_params(model, llm.mesh, jax.random.key(0))
    else:
        model, keys = llm.model, iter(range(10**6))
        shake = lambda x: x + noise * jax.random.normal(jax.random.key(next(keys)), x.shape)  # noqa: E731
        params = jax.tree.map(shake, llm.params)
    return LLM.from_params(model, params, None, mesh=llm.mesh)


@pytest.mark.slow
def test_traces_hold_drafts_of_the_device(llm, tmp_path):
    trace = tmp_path / "trace.jsonl"
    engine = Engine(llm, EngineConfig(**(SIZES | {"trace": str(trace)})), drafter=llm)
    engine.runner.drafter.cost = 0.0
    engine.generate(PROMPTS[:1], ASKED[:1])
    assert engine.drafted_tokens and replay(read_trace(trace)) is None


def serve(llm, drafter, wanted, **changes):
    """An engine that drafts as often as it can, after it served all requests twice."""
    engine = Engine(llm, EngineConfig(**(SIZES | changes)), drafter=drafter)
    engine.runner.drafter.cost = 0.0
    for _ in range(2):  # the second time with a known prefix
        outputs = engine.generate(PROMPTS, ASKED)
        assert [o.token_ids for o in outputs] == [o.token_ids for o in wanted]
        for ours, theirs in zip(outputs, wanted, strict=True):
            if theirs.logprobs is not None:
                np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
    for scheduler in engine.schedulers:
        load = scheduler.load()
        assert load.running == load.waiting == 0 and load.free_pages == load.total_pages
    return engine


def test_a_model_drafts_for_itself_without_a_mistake(llm, expected):
    engine = serve(llm, llm, expected)
    assert engine.accepted_tokens == engine.drafted_tokens > 80
    assert engine.schedulers[0].statistics.hit_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"pages": (9,), "preemption": "offload", "host_pages": 16},
        {"pages": (9,)},
        {"max_rows": 3, "token_budget": 20, "prefix_cache": False},
    ],
)
def test_wherever_its_pages_go(llm, expected, changes):
    engine = serve(llm, llm, expected, **changes)
    assert engine.accepted_tokens == engine.drafted_tokens > 80
    assert (engine.schedulers[0].statistics.preemptions > 0) == ("pages" in changes)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data:2", "tensor:2", "tensor:6"])  # of 2 key heads
def test_meshes(tmp_path, expected, mesh):
    sharded = load(tmp_path, "llama", mesh=mesh)
    engine = serve(sharded, sharded, expected)
    assert engine.accepted_tokens == engine.drafted_tokens > 60


@pytest.mark.slow
def test_windows(tmp_path):
    llm = load(tmp_path, "gemma3")
    assert any(llm.model.config.layer_windows)
    wanted = [o for p, a in zip(PROMPTS, ASKED, strict=True) for o in llm.generate([p], a)]
    engine = serve(llm, llm, wanted)
    assert engine.accepted_tokens == engine.drafted_tokens > 80


@pytest.mark.slow
def test_drafts_change_nothing(llm, expected):
    engine = serve(llm, near(llm, 0.02), expected)
    assert 0 < engine.accepted_tokens < engine.drafted_tokens


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [90, 120])
def test_models_of_other_vocabularies(llm, expected, vocab_size):
    engine = serve(llm, near(llm, 0, num_layers=1, vocab_size=vocab_size), expected)
    assert engine.accepted_tokens < engine.drafted_tokens


def small_head(llm, scale):
    """A head that nearly repeats the newest token, and its parameters."""
    head = describe_draft_head(llm.model.config, width=32)
    params = init_draft_head(head, llm.mesh, jax.random.key(1))
    down = scale * jax.random.normal(jax.random.key(2), params["down"].shape)
    return head, dict(params, down=down)


def test_a_head_drafts_what_its_formula_says(llm, expected):
    """As many drafts stay as a simulation on the finished text counts, from one forward of it."""
    head, params = small_head(llm, 0.02)
    engine = Engine(llm, EngineConfig(**(SIZES | {"speculation": "draft_head"})), drafter=(head, params))
    engine.runner.drafter.cost = 0.0
    (output,) = engine.generate(PROMPTS[:1], ASKED[:1])
    assert output.token_ids == expected[0].token_ids
    net, cell = llm.model.bind(llm.params), head.bind(params)
    text = np.array([*PROMPTS[0], *output.token_ids], np.int32)
    context = FullContext(jnp.ones((1, len(text)), jnp.int32))
    hidden, _ = net(text[None], np.arange(len(text), dtype=np.int32)[None], context)
    at, drafted, accepted = len(PROMPTS[0]), 0, 0
    while at < len(text) - 1:
        count, state, token, right = min(len(text) - at - 2, 3), hidden[0, at - 1], text[at], 0
        for place in range(count):
            state = cell(state[None, None], net.embed.lookup(token[None, None]))[0, 0]
            token = np.asarray(net.unembed(state).argmax(), np.int32)
            right += right == place and token == text[at + place + 1]
        at, drafted, accepted = at + right + 1, drafted + count, accepted + right
    assert (engine.drafted_tokens, engine.accepted_tokens) == (drafted, accepted)
    assert 0 < accepted < drafted


@pytest.mark.slow
def test_a_head_changes_nothing(llm, expected):
    for changes in ({}, {"pages": (9,), "preemption": "offload", "host_pages": 16}):
        serve(llm, small_head(llm, 0.02), expected, speculation="draft_head", **changes)


@pytest.mark.slow
def test_what_is_compiled_ahead_is_all_there_is(llm):
    one = {"max_rows": 2, "token_budget": 16, "draft_tokens": 2, "compile_ahead": True}
    engine = Engine(llm, EngineConfig(**(SIZES | one)), drafter=near(llm, 0.02))
    engine.generate(PROMPTS[:2], ASKED[:2])
    assert engine.misses == 0 and engine.drafted_tokens > 0


def test_what_is_refused(llm, tmp_path):
    config = EngineConfig(**SIZES)
    with pytest.raises(ValueError, match="'draft_model' with drafter=NoneType"):
        Engine(llm, config)
    with pytest.raises(ValueError, match="speculation='off' with drafter=LLM"):
        Engine(llm, dataclasses.replace(config, speculation="off"), drafter=llm)
    with pytest.raises(ValueError, match="max_positions=32 of it are fewer than max_length=60"):
        Engine(llm, config, drafter=near(llm, 0, max_positions=32))
    with pytest.raises(ValueError, match=r"windows are \(16,\), the model's \(0,\)"):
        Engine(llm, config, drafter=near(llm, 0, windows=(16,) * 3))
    heads = dataclasses.replace(config, speculation="draft_head")
    with pytest.raises(ValueError, match="embed_dim=24 of its model; expected 48"):
        Engine(llm, heads, drafter=small_head(near(llm, 0, embed_dim=24), 0))
    with pytest.raises(
        ValueError,
        match="speculation='draft_head' with drafter=LLM.*'draft_head' what load_draft_head gives",
    ):
        Engine(llm, heads, drafter=llm)
    with pytest.raises(ValueError, match="its mesh is"):
        Engine(llm, config, drafter=load(tmp_path, "llama", mesh="data:2"))


def test_as_many_are_drafted_as_pays():
    """By the formula: with a = 0.8 and c = 0.1 the best of 0 to 8 is 5; what never is right, rests."""
    length = DraftLength(8, cost=0.1)
    for _ in range(200):
        length.learn(5, 4)
    length._right, length._judged = 4.0, 5.0
    gains = [(1 - 0.8 ** (n + 1)) / 0.2 / (1 + 0.1 * n) for n in range(9)]
    assert length.propose([], 8) == [ON_DEVICE] * int(np.argmax(gains))
    assert length.propose([], 2) == [ON_DEVICE] * 2
    for _ in range(50):
        length.learn(1, 0)
    asked = [len(length.propose([], 8)) for _ in range(2 * (PATIENCE + 1))]
    assert asked == [1, *[0] * PATIENCE] * 2
