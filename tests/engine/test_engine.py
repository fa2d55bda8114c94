"""The engine beside `LLM.generate`, which has one batch and no pages: the same tokens always."""

import asyncio
import dataclasses
import json
import random
import re

import jax
import numpy as np
import pytest

from llm_jax import LLM, SamplingParams
from llm_jax.checkpoint.hf import load_config, load_hf
from llm_jax.config import EngineConfig
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.engine.engine import Engine
from llm_jax.engine.runner import Flight
from llm_jax.engine.scheduler import QueueFull
from llm_jax.infer.llm import DEMO_MODEL
from llm_jax.models import describe
from llm_jax.ops.sampling_params import StructuredSpec
from llm_jax.sharding import make_mesh

SLOW = pytest.mark.slow
SIZES = {"max_rows": 4, "token_budget": 32, "max_length": 96, "page_size": 16, "compile_ahead": False}
TEXTS = [
    "我喜欢编程。",
    "今天天气很好",
    "人工智能",
    "程序员每天都在写代码，他们喜欢解决难题，也喜欢学习新的东西。",
]
GREEDY = SamplingParams(max_new_tokens=20, temperature=0)
VARIED = [
    SamplingParams(max_new_tokens=17, temperature=0.8, top_p=0.9, seed=1),
    SamplingParams(max_new_tokens=9, temperature=1.2, top_k=20, seed=2, repetition_penalty=1.3, n=2),
    SamplingParams(max_new_tokens=20, temperature=0, logprobs=3, frequency_penalty=0.5),
    SamplingParams(max_new_tokens=12, temperature=0.7, min_p=0.05, seed=4, logit_bias={7: 2.0}),
]


def short(mesh=""):
    """The first two layers of the bundled model: texts of little sense, compiled in half the time."""
    config, mesh = load_config(DEMO_MODEL), make_mesh(mesh)
    params = load_hf(DEMO_MODEL, describe(config), mesh)
    params["layers"] = jax.tree.map(lambda x: x[:2], params["layers"])
    model = describe(dataclasses.replace(config, num_layers=2))
    return LLM.from_params(model, params, load_tokenizer(DEMO_MODEL), mesh=mesh)


@pytest.fixture(scope="module")
def llm():
    return short()


@pytest.fixture(scope="module")
def expected(llm):
    """What LLM.generate makes of TEXTS, greedily and as VARIED asks."""
    varied = [
        output
        for pair in zip(TEXTS, VARIED, strict=True)
        for output in llm.generate(*[[x] for x in pair])
    ]
    return {"greedy": llm.generate(TEXTS, GREEDY), "varied": varied}


def engine(llm, **changes):
    return Engine(llm, EngineConfig(**(SIZES | changes)))


def nothing_left(engine):
    """Whether no page is in use and no request is known."""
    assert engine.idle
    for scheduler in engine.schedulers:
        load = scheduler.load()
        assert load.running == load.waiting == 0 and load.free_pages == load.total_pages
    return True


def same(outputs, wanted):
    assert [o.token_ids for o in outputs] == [o.token_ids for o in wanted]
    assert [o.text for o in outputs] == [o.text for o in wanted]
    assert [o.finish_reason for o in outputs] == [o.finish_reason for o in wanted]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"overlap": False},
        pytest.param({"prefix_cache": False, "page_size": 8}, marks=SLOW),
        pytest.param({"max_rows": 2, "token_budget": 17}, marks=SLOW),
        {"speculation": "prompt_lookup", "draft_tokens": 3},
    ],
)
def test_the_same_tokens_as_a_fixed_batch(llm, expected, changes):
    serving = engine(llm, **changes)
    same(serving.generate(TEXTS, GREEDY), expected["greedy"])
    outputs = serving.generate(TEXTS, VARIED)
    same(outputs, expected["varied"])
    for ours, theirs in zip(outputs, expected["varied"], strict=True):
        if theirs.logprobs is not None:
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
            assert [list(top) for top in ours.top_logprobs] == [list(t) for t in theirs.top_logprobs]
    assert nothing_left(serving)


@pytest.mark.parametrize("preemption", ["recompute", "offload"])
def test_pages_run_out(llm, expected, preemption):
    host = {"host_pages": 8} if preemption == "offload" else {}
    texts, few = TEXTS * 2, {"pages": (8,), "page_size": 8, "max_length": 56}
    serving = engine(llm, preemption=preemption, **host, **few)
    same(serving.generate(texts, GREEDY), expected["greedy"] * 2)
    statistics = serving.schedulers[0].statistics
    assert statistics.preemptions > 0
    assert (statistics.offloads > 0) == (preemption == "offload")
    assert nothing_left(serving)


@SLOW
@pytest.mark.parametrize("mesh", ["data:2", "data:2,tensor:2"])
def test_meshes(expected, mesh):
    serving = engine(short(mesh))
    same(serving.generate(TEXTS, GREEDY), expected["greedy"])
    assert all(s.statistics.requests == 2 for s in serving.schedulers), "each shard has its share"
    assert nothing_left(serving)


def test_nothing_is_compiled_after_the_beginning(llm, expected):
    few = {"max_rows": 2, "page_size": 8, "pages": (8,), "max_length": 56, "prefix_host_pages": 20}
    serving = engine(llm, compile_ahead=True, **few)
    assert serving.misses == 0
    same(serving.generate(TEXTS, GREEDY), expected["greedy"])
    serving.generate(TEXTS, VARIED)
    assert serving.misses == 0
    counts = serving.schedulers[0].prefix.statistics
    assert counts.offloaded > 0 < counts.restored, "and pages went to the host and back"


def test_random_cancellation_leaves_the_others_alone(llm, expected):
    serving, rng = engine(llm), random.Random(0)
    wanted = {}
    for i in range(16):
        name = serving.add(TEXTS[i % 4], GREEDY, id=f"r{i}")
        wanted[name] = expected["greedy"][i % 4]
    victims, ended = rng.sample(sorted(wanted), 8), {}
    while not serving.idle:
        for delta in serving.step():
            if delta.finish_reason:
                ended[delta.id] = delta.output
        if victims and rng.random() < 0.5:
            serving.cancel(victims.pop())
    assert set(ended) == set(wanted)
    reasons = {name: output.finish_reason for name, output in ended.items()}
    assert 0 < sum(reason == "cancelled" for reason in reasons.values()) <= 8
    for name, output in ended.items():
        if reasons[name] != "cancelled":
            assert output.token_ids == wanted[name].token_ids
        else:
            assert output.token_ids == wanted[name].token_ids[: len(output.token_ids)]
    assert nothing_left(serving) and not serving.cancel("r0")


def test_a_callback_that_raises_ends_its_own_request(llm, expected, caplog):
    serving, got = engine(llm), {}

    def bad(delta):
        raise RuntimeError("the caller's own")

    serving.add(TEXTS[0], GREEDY, id="bad", on_text=bad)
    serving.add(TEXTS[1], GREEDY, id="good")
    while not serving.idle:
        got |= {delta.id: delta.output for delta in serving.step()}
    assert got["bad"].finish_reason == "error" and "its callback raised" in caplog.text
    assert got["good"].token_ids == expected["greedy"][1].token_ids
    assert nothing_left(serving)


def test_streams_of_asyncio(llm, expected):
    serving = engine(llm)

    async def read(text):
        return "".join([delta.text async for delta in serving.stream(text, GREEDY)])

    async def leave(text):
        async for _ in serving.stream(text, GREEDY):
            break

    async def cancelled(text):
        reasons = []
        async for delta in serving.stream(text, GREEDY, id="victim"):
            serving.cancel("victim")
            reasons.append(delta.finish_reason)
        return reasons

    async def all_of_them():
        return await asyncio.gather(*map(read, TEXTS), cancelled(TEXTS[0]), leave(TEXTS[0]))

    *texts, reasons, _ = asyncio.run(asyncio.wait_for(all_of_them(), 300))
    assert texts == [output.text for output in expected["greedy"]]
    assert reasons[-1] == "cancelled"
    while not serving.idle:
        serving.step()
    assert nothing_left(serving)


def test_streams_are_not_behind_the_steps(llm):
    serving, behind = engine(llm), []

    async def read(i):
        seen = 0
        async for delta in serving.stream([20 + i], dataclasses.replace(GREEDY, ignore_eos=True)):
            seen += len(delta.token_ids)
            behind.append(len(delta.output.token_ids) - seen)

    async def everyone():
        await asyncio.gather(*map(read, range(4)))

    asyncio.run(everyone())
    assert len(behind) == 80 and np.mean(behind) < 1, "one step serves all streams"


def test_what_a_step_raises_reaches_the_stream(llm, monkeypatch):
    serving = engine(llm)
    monkeypatch.setattr(serving, "_dispatch", lambda: 1 / 0)

    async def read():
        async for _ in serving.stream("a", GREEDY):
            pass

    with pytest.raises(ZeroDivisionError):
        asyncio.run(asyncio.wait_for(read(), 60))


def test_an_interrupt_while_it_waits_leaves_the_engine_as_it_was(llm, expected, monkeypatch):
    serving, wait, left = engine(llm), Flight.wait, [4]

    def interrupted(flight):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        wait(flight)

    monkeypatch.setattr(Flight, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        serving.generate(TEXTS, GREEDY)
    assert nothing_left(serving), "what was asked for is cancelled"
    names, ended, left[0] = [serving.add(text, GREEDY) for text in TEXTS], {}, 3
    while not serving.idle:
        try:
            ended |= {delta.id: delta.output for delta in serving.step()}
        except KeyboardInterrupt:
            assert left[0] == 0
    same([ended[name] for name in names], expected["greedy"])
    assert nothing_left(serving)


def test_an_interrupted_step_tells_all_and_forms_stay_right(llm, monkeypatch):
    """What it had to tell comes with the next one; a form's next token waits for the one before."""
    form = StructuredSpec("regex", "[0-9]{3}-[a-z]{2}")
    asked = SamplingParams(max_new_tokens=24, temperature=1, seed=1, structured=form)
    (wanted,) = engine(llm).generate([TEXTS[0]], asked)
    serving, wait, ended = engine(llm), Flight.wait, {}
    waits = iter([False, True] * 100)

    def interrupted(flight):
        if next(waits):
            raise KeyboardInterrupt
        wait(flight)

    monkeypatch.setattr(Flight, "wait", interrupted)
    names = [serving.add(TEXTS[0], asked), serving.add(TEXTS[1], GREEDY)]
    serving.step()
    serving.cancel(names[1])  # the next step would report it, and is interrupted
    interrupts = 0
    while not serving.idle:
        try:
            ended |= {delta.id: delta.output for delta in serving.step()}
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts > 3 and set(ended) == set(names)
    assert ended[names[1]].finish_reason == "cancelled"
    assert ended[names[0]].token_ids == wanted.token_ids
    assert nothing_left(serving)


def test_a_step_that_failed_is_the_last_one(llm, monkeypatch):
    serving = engine(llm)
    monkeypatch.setattr(serving.runner, "run", lambda plans: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        serving.generate(TEXTS, GREEDY)
    with pytest.raises(RuntimeError, match="an earlier step of this engine failed.*make a new Engine"):
        serving.generate(TEXTS, GREEDY)


def test_a_shared_beginning_is_computed_once(llm):
    serving = engine(llm, max_rows=4, token_budget=64)
    prefix = list(range(5, 69))
    prompts = [[*prefix, 100 + i] for i in range(6)]
    outputs = serving.generate(prompts, dataclasses.replace(GREEDY, max_new_tokens=4))
    same(outputs, llm.generate(prompts, dataclasses.replace(GREEDY, max_new_tokens=4)))
    statistics = serving.schedulers[0].statistics
    assert statistics.hit_tokens == 5 * 64
    serving.generate(prompts, dataclasses.replace(GREEDY, max_new_tokens=1))
    assert statistics.hit_tokens == 11 * 64


def test_stop_strings_and_ids(llm, expected):
    serving, whole = engine(llm), expected["greedy"][0]
    cut = dataclasses.replace(GREEDY, stop=(whole.text[4:6],))
    same(serving.generate([TEXTS[0]], cut), llm.generate([TEXTS[0]], cut))
    ended = dataclasses.replace(GREEDY, stop_ids=(whole.token_ids[3],))
    same(serving.generate([TEXTS[0]], ended), llm.generate([TEXTS[0]], ended))
    assert nothing_left(serving)


def test_prompt_logprobs_and_best_of(llm):
    serving = engine(llm, prompt_logprobs=True)
    asked = dataclasses.replace(GREEDY, prompt_logprobs=2, max_new_tokens=3)
    prompt = list(range(10, 60))  # in two chunks
    (ours,), (theirs,) = (x.generate([prompt], asked) for x in (serving, llm))
    assert ours.prompt_logprobs[0] is None and len(ours.prompt_logprobs) == len(prompt)
    np.testing.assert_allclose(ours.prompt_logprobs[1:], theirs.prompt_logprobs[1:], atol=1e-4)
    assert [set(x or ()) for x in ours.prompt_top_logprobs] == [
        set(x or ()) for x in theirs.prompt_top_logprobs
    ]
    best = SamplingParams(max_new_tokens=8, temperature=1, seed=3, best_of=4, n=2)
    same(serving.generate([TEXTS[0]], best), llm.generate([TEXTS[0]], best))
    with pytest.raises(ValueError, match="prompt_logprobs is 2: this engine was not made for it"):
        engine(llm).add(prompt, asked)


def test_prompt_logprobs_where_a_prompt_is_computed_again(llm):
    serving = engine(llm, prompt_logprobs=True, pages=(8,), page_size=8, max_length=56)
    asked = dataclasses.replace(GREEDY, prompt_logprobs=0, ignore_eos=True)
    prompts = [[10 + i, *range(20, 39)] for i in range(4)]
    outputs = serving.generate(prompts, asked)
    assert serving.schedulers[0].statistics.preemptions > 0
    for ours, theirs in zip(outputs, llm.generate(prompts, asked), strict=True):
        np.testing.assert_allclose(ours.prompt_logprobs[1:], theirs.prompt_logprobs[1:], atol=1e-4)
    assert nothing_left(serving)


def test_a_refused_request_leaves_nothing(llm):
    plain = LLM.from_params(llm.model, llm.params, None, mesh=llm.mesh)
    serving = engine(plain)
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        serving.add([5, 6], dataclasses.replace(GREEDY, stop=("a",)))
    with pytest.raises(ValueError, match="SamplingParams.best_of is 3"):
        serving.add([5, 6], SamplingParams(best_of=3, max_new_tokens=4))
    with pytest.raises(ValueError, match="prompt 0 has no tokens"):
        serving.generate([[5, 6], []], GREEDY)
    assert nothing_left(serving)


def test_what_is_refused_and_what_waits(llm):
    serving = engine(llm, max_queue=2)
    refused = {
        "has no tokens": ([], GREEDY),
        "together more than max_positions": ([5] * 600, GREEDY),
        "more than max_length=96": ([5] * 90, GREEDY),
        "from 1 to max_row": ("a", dataclasses.replace(GREEDY, n=9)),
        "logprobs is 21": ("a", dataclasses.replace(GREEDY, logprobs=21)),
        "holds id 9999": ([9999], GREEDY),
    }
    for message, request in refused.items():
        with pytest.raises(ValueError, match=message):
            serving.add(*request)
    with pytest.raises(ValueError, match="top_p is 2"):
        SamplingParams(top_p=2)
    serving.add("a", GREEDY, id="x")
    with pytest.raises(ValueError, match="in use"):
        serving.add("a", GREEDY, id="x")
    serving.add("a", GREEDY)
    with pytest.raises(QueueFull, match="max_queue=2"):
        serving.add("a", GREEDY)
    late = {}
    serving.cancel("x")
    serving.add("b", GREEDY, id="late", deadline_s=0.0)
    while not serving.idle:
        late |= {delta.id: delta.finish_reason for delta in serving.step()}
    assert late["late"] == "deadline" and late["x"] == "cancelled"
    assert nothing_left(serving)
    with pytest.raises(ValueError, match="max_length=9999: expected at most max_positions"):
        engine(llm, max_length=9999)
    with pytest.raises(ValueError, match=r"pages=\(9, 9\): expected one number"):
        engine(llm, pages=(9, 9))


@SLOW
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_caches_of_eight_bits(llm, expected, dtype):
    serving = engine(llm, cache_dtype=dtype)
    outputs = serving.generate(TEXTS, dataclasses.replace(GREEDY, logprobs=0))
    agree = [
        ours.token_ids[:4] == theirs.token_ids[:4]
        for ours, theirs in zip(outputs, expected["greedy"], strict=True)
    ]
    assert sum(agree) >= 3, "rounded keys change a token only where two are about as likely"


def test_texts_have_the_form_that_was_asked_for(llm):
    schema = '{"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}'
    forms = [
        StructuredSpec("choice", '["积极", "消极", "中性"]'),
        StructuredSpec("regex", "[0-9]{3}-[a-z]{2}"),
        StructuredSpec("json", schema),
    ]
    asked = [
        SamplingParams(max_new_tokens=24, temperature=1, seed=i, structured=f)
        for i, f in enumerate(forms)
    ]
    plain = SamplingParams(max_new_tokens=24, temperature=0)
    results = []
    for changes in ({}, {"speculation": "prompt_lookup"}):
        serving = engine(llm, **changes)
        outputs = serving.generate([TEXTS[0]] * 4, [*asked, plain])
        assert outputs[0].text in ("积极", "消极", "中性")
        assert re.fullmatch("[0-9]{3}-[a-z]{2}", outputs[1].text)
        if outputs[2].finish_reason == "stop":
            assert isinstance(json.loads(outputs[2].text)["x"], int)
        assert all(output.finish_reason == "stop" for output in outputs[:2])
        results.append([output.token_ids for output in outputs])
        assert nothing_left(serving)
    assert results[0] == results[1], "drafts change nothing"
    assert results[0][3] == llm.generate([TEXTS[0]], plain)[0].token_ids


MIXES = [  # of one page size: sums are taken page by page
    {},
    {"max_rows": 1},
    {"token_budget": 17, "prefix_cache": False},
    {"speculation": "prompt_lookup", "overlap": False},
    {"pages": (8,), "max_length": 80},
    {"pages": (8,), "max_length": 80, "prefix_host_pages": 30},
]


@SLOW
def test_strict_numerics_are_the_same_in_every_bit(llm):
    asked = [
        dataclasses.replace(GREEDY, logprobs=2),
        SamplingParams(max_new_tokens=16, temperature=0.9, top_p=0.9, seed=1, logprobs=0),
        SamplingParams(max_new_tokens=16, temperature=0.7, seed=2, repetition_penalty=1.2, logprobs=1),
    ]
    rng, results = random.Random(0), []
    for changes in MIXES:
        serving = engine(llm, strict_numerics=True, **changes)
        order = [(i, j) for i in range(len(TEXTS)) for j in range(len(asked))]
        rng.shuffle(order)
        outputs = serving.generate([TEXTS[i] for i, _ in order], [asked[j] for _, j in order])
        found = {
            place: (o.token_ids, o.logprobs, o.top_logprobs)
            for place, o in zip(order, outputs, strict=True)
        }
        results.append(dict(sorted(found.items())))
    for other in results[1:]:
        assert other == results[0]
