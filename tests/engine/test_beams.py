"""Beam search in the engine: as a fixed batch and transformers have it, whatever else the steps hold."""

import asyncio
import functools
import itertools
import math
import random

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from llm_jax.config import EngineConfig  # noqa: E402
from llm_jax.engine.beams import BeamRules, Candidates  # noqa: E402
from llm_jax.engine.engine import Engine  # noqa: E402
from llm_jax.engine.pages import PoolSpec  # noqa: E402
from llm_jax.engine.plan import SchedulerConfig  # noqa: E402
from llm_jax.engine.trace import changed_config, read_trace, replay  # noqa: E402
from llm_jax.engine.whatif import measured, whatif  # noqa: E402
from llm_jax.infer.beam_options import BeamOptions  # noqa: E402
from llm_jax.ops.sampling_params import StructuredSpec  # noqa: E402
from tests.engine.test_engine import nothing_left  # noqa: E402
from tests.engine.test_scheduler import Harness  # noqa: E402
from tests.infer.test_beam import (  # noqa: E402
    END,
    MIXED,
    NEW,
    PROMPTS,
    check,
    greedy,
    mixed,
    models,
    reference,
    small_programs,  # noqa: E402, F401
)

SLOW = pytest.mark.slow
SIZES = {"max_rows": 4, "token_budget": 32, "max_length": 40, "page_size": 8, "max_beams": 4}
SIZES |= {"pages": (64,)}
SAMPLED = [
    greedy(),
    greedy(temperature=0.9, seed=1, logprobs=2),
    greedy(temperature=0.8, seed=2, repetition_penalty=1.3),
]


def engine(name="llama", mesh="data:1", **changes):
    config = SIZES | {"compile_ahead": False} | changes
    return Engine(models(name, mesh)[0], EngineConfig(**config))


@functools.cache
def one():
    return engine()


def agree(outputs, expected):
    """The same continuations, with the same numbers but for the last bits of float32."""
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert [(o.prompt_ids, o.sample, o.finish_reason) for o in outputs] == [
        (o.prompt_ids, o.sample, o.finish_reason) for o in expected
    ]
    np.testing.assert_allclose([o.score for o in outputs], [o.score for o in expected], atol=1e-5)
    for ours, theirs in zip(outputs, expected, strict=True):
        assert (ours.logprobs is None) == (theirs.logprobs is None)
        np.testing.assert_allclose(ours.logprobs or [], theirs.logprobs or [], atol=1e-5)


def finish(serving):
    """Run all that was added; the deltas that end something, by (id, sample)."""
    ended = {}
    while not serving.idle:
        for delta in serving.step():
            if delta.finish_reason is not None:
                assert (delta.id, delta.sample) not in ended
                ended[delta.id, delta.sample] = delta
    return ended


# The rules alone.


def enumerate_all(logprobs, vocab, longest, stop):
    """(tokens, sum) of every continuation that ends at `stop` or is of the longest length."""
    for length in range(1, longest + 1):
        for tokens in itertools.product(range(vocab), repeat=length):
            ends = tokens[-1] == stop or length == longest
            if ends and stop not in tokens[:-1]:
                yield tokens, sum(logprobs(tokens[:at])[token] for at, token in enumerate(tokens))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("early", [False, True, "never"])
def test_a_search_wide_enough_finds_the_best_of_all(seed, early):
    """Of 3 tokens, of which one ends, at most 4 long; beams that cannot be are among the 24."""
    vocab, longest, stop = 3, 4, 0

    @functools.cache
    def logprobs(tokens):
        logits = np.random.default_rng([seed, *tokens]).normal(size=vocab)
        return (logits - np.log(np.exp(logits).sum())).astype(np.float32)

    def candidates(beam):
        order = np.argsort(-logprobs(beam.tokens))
        return Candidates(order, *[logprobs(beam.tokens)[order]] * 2)

    rules = BeamRules(BeamOptions(24, length_penalty=0.7, early_stopping=early), longest, [stop])
    while rules.open:
        rules.extend([candidates(beam) for beam in rules.running])
    found = [(beam.tokens, float(beam.score)) for beam in rules.found()]
    every = enumerate_all(logprobs, vocab, longest, stop)
    best = sorted(((tokens, total / len(tokens) ** 0.7) for tokens, total in every), key=lambda x: -x[1])
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in best[:24]]
    np.testing.assert_allclose([s for _, s in found], [s for _, s in best[:24]], rtol=1e-5)


def test_what_was_found_until_it_is_cut_short():
    rules = BeamRules(BeamOptions(2), 9, [0])
    assert rules.found() == []
    logprobs = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    assert rules.extend([Candidates(np.array([1, 0, 2]), logprobs, logprobs)]) == [(0, 1), (0, 2)]
    assert [beam.tokens for beam in rules.found()] == [(1,), (0,), (2,)]


# The scheduler's part: see test_scheduler.py for what the harness checks.


@pytest.mark.parametrize("seed", range(25))
def test_searches_with_scarce_pages(seed):
    """Rows that read anything but their own beam's tokens, lost pages and standstills are errors."""
    draw = random.Random(seed).choice
    pools = [(PoolSpec(26),), (PoolSpec(30, window=3), PoolSpec(40)), (PoolSpec(30, window=5),)]
    alignment = draw([1, 4])
    config = SchedulerConfig(
        max_rows=6,
        token_budget=5 + alignment + draw([alignment, 8, 24]),
        page_size=draw([1, 2, 4]),
        pools=pools[seed % 3],
        max_length=30,
        prefix_cache=draw([True, False]),
        alignment=alignment,
        chunk_tokens=draw([0, 4, 8]),
    )
    harness = Harness(config)
    for _ in range(60):
        prompt = [1] * draw([1, 3, 4]) + [draw([1, 2]) for _ in range(draw([1, 2, 5]))]
        options = {"n": draw([1, 2, 3, 4]), "search": draw([True, True, False])}
        if draw([True, False]):
            harness.add(prompt, draw([5, 9, 12]), priority=draw([0, 1, 9]), **options)
        harness.plan()
        if harness.open:
            harness.commit()
        harness.check()
    harness.drain()


# The engine.


@pytest.mark.parametrize(
    "early_stopping, length_penalty", [(False, 1.0), (True, 2.5), ("never", 1.0), ("never", -1.0)]
)
def test_same_as_transformers(early_stopping, length_penalty):
    options = {"early_stopping": early_stopping, "length_penalty": length_penalty}
    options |= {"num_beams": 3, "num_return": 3}
    outputs = one().beam_search(PROMPTS, greedy(stop_ids=END), **options)
    check(outputs, reference(models("llama")[1], PROMPTS, stop_ids=END, **options))
    assert nothing_left(one())


@SLOW
def test_window_layers_same_as_transformers():
    """Two pools of pages, one of which lets go of what its window has passed."""
    options = {"num_beams": 3, "num_return": 2}
    outputs = engine("gemma3", pages=(64, 64)).beam_search(PROMPTS, greedy(stop_ids=END), **options)
    check(outputs, reference(models("gemma3")[1], PROMPTS, stop_ids=END, **options))


@pytest.mark.parametrize("num_beams, num_return, stop_ids", [(2, 1, ()), (4, 4, END)])
def test_widths_and_ends(num_beams, num_return, stop_ids):
    options = {"num_beams": num_beams, "num_return": num_return}
    outputs = one().beam_search(PROMPTS, greedy(stop_ids=stop_ids), **options)
    check(outputs, reference(models("llama")[1], PROMPTS, stop_ids=stop_ids, **options))


def test_one_beam_is_greedy():
    asked = greedy(stop_ids=END, logprobs=0)
    outputs = one().beam_search(PROMPTS, asked, num_beams=1)
    for ours, alone in zip(outputs, one().generate(PROMPTS, asked), strict=True):
        assert (ours.token_ids, ours.finish_reason) == (alone.token_ids, alone.finish_reason)
        np.testing.assert_allclose(ours.logprobs, alone.logprobs, atol=1e-5)
        assert math.isclose(ours.score, np.mean(alone.logprobs), abs_tol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prefix_cache": False, "overlap": False},
        pytest.param({"speculation": "prompt_lookup", "draft_tokens": 2}, marks=SLOW),
        pytest.param({"strict_numerics": True}, marks=SLOW),
        pytest.param({"mesh": "data:2,tensor:2"}, marks=SLOW),
    ],
)
def test_each_search_has_its_own_limits_and_penalties(changes):
    """As a fixed batch has them, which test_beam.py holds to transformers."""
    expected, prompts = mixed()
    serving = engine(**changes)
    params = [MIXED[name] for name in prompts]
    outputs = serving.beam_search(list(prompts.values()), params, num_beams=3, num_return=2)
    agree(outputs, [output for name in prompts for output in expected[name]])
    assert nothing_left(serving)


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"speculation": "prompt_lookup", "draft_tokens": 2}, marks=SLOW)]
)
def test_others_in_the_same_steps_do_not_notice(changes):
    alone = one().generate(PROMPTS, SAMPLED)
    searched = one().beam_search(PROMPTS, greedy(stop_ids=END), num_beams=3, num_return=2)
    serving, both, ended = engine(**changes), 0, {}
    for i, prompt in enumerate(PROMPTS):
        serving.add(prompt, SAMPLED[i], id=f"other {i}")
        serving.add(prompt, greedy(stop_ids=END), id=f"search {i}", beams=BeamOptions(3, 2))
    while not serving.idle:
        both += len({s.request.search for s in serving.schedulers[0].running}) == 2
        for delta in serving.step():
            searches = delta.id.startswith("search")
            assert delta.finish_reason or not searches, "all that a search says comes at its end"
            if delta.finish_reason is not None:
                ended[delta.id, delta.sample] = delta.output
    assert both > NEW / 2, "steps with both"
    for i, output in enumerate(alone):
        mine = ended[f"other {i}", 0]
        assert mine.token_ids == output.token_ids
        np.testing.assert_allclose(mine.logprobs or [], output.logprobs or [], atol=1e-5)
    agree([ended[f"search {i}", j] for i in range(3) for j in range(2)], searched)


@pytest.mark.parametrize("name, pages", [("llama", (13,)), pytest.param("gemma3", (13, 13), marks=SLOW)])
def test_pages_run_out(name, pages):
    """A search that ranks below others loses all its rows, and goes on from its beams' own tokens."""
    serving, again, ended = engine(name, pages=pages, max_rows=8), 0, {}
    serving.add(PROMPTS[0], greedy(max_new_tokens=24), id="search", beams=BeamOptions(3, 3))
    while not serving.idle:
        if serving.schedulers[0].statistics.steps == 12:
            for i in range(4):
                serving.add([5 + i, 9], greedy(max_new_tokens=22), id=f"other {i}", priority=5)
        again += any(s.request.search and s.generated for s in serving.schedulers[0].waiting)
        ended |= {(delta.id, delta.sample): delta.output for delta in serving.step()}
    assert again and nothing_left(serving)
    options = {"num_beams": 3, "num_return": 3, "max_new_tokens": 24}
    expected = reference(models(name)[1], PROMPTS[:1], stop_ids=(), **options)
    check([ended["search", i] for i in range(3)], expected)


def test_a_trace_repeats_searches(tmp_path):
    """Bit for bit, among others, with pages short; and what-ifs find as much, also where none are."""
    path = tmp_path / "trace.jsonl"
    serving = engine(pages=(13,), max_rows=8, trace=str(path))
    serving.add(PROMPTS[0], greedy(max_new_tokens=24), beams=BeamOptions(3))
    serving.add(PROMPTS[1], greedy(stop_ids=END), beams=BeamOptions(2))
    for i in range(3):
        serving.add([5 + i, 9], greedy(max_new_tokens=22), priority=5)
    finish(serving)
    trace, found = read_trace(path), serving.schedulers[0].statistics
    assert found.preemptions > 0 and replay(trace) is None
    for pages in (13, 64):
        config = changed_config(trace.config, {"pools": [{"pages": pages}]})
        then = whatif(trace, config, lambda plan: 10.0)  # all have come by the second step
        assert then["tokens"] == measured(trace)["tokens"] and then["finished"] == found.finished
        assert (then["preemptions"] > 0) == (pages == 13)


def test_a_search_waits_for_its_rows_and_nobody_goes_before():
    serving, begun = engine(), {}
    for i in range(3):
        serving.add([5 + i, 9], greedy(max_new_tokens=3 + i), id=f"before {i}")
    serving.add(PROMPTS[0], greedy(), id="search", beams=BeamOptions(4))
    for i in range(4):
        serving.add([5 + i, 19], greedy(), id=f"after {i}")
    while not serving.idle:
        serving.step()
        for sequence in sorted(serving.schedulers[0].running, key=lambda s: s.rank):
            begun.setdefault(sequence.request.id, len(begun))
    assert begun["search"] == 3 and len(begun) == 8


def test_nothing_is_compiled_after_the_beginning():
    serving = engine(compile_ahead=True, max_rows=2, max_beams=2, token_budget=17)
    serving.add(PROMPTS[0], SAMPLED[1])
    for params in (greedy(), greedy(frequency_penalty=0.3, stop_ids=END)):
        serving.beam_search(PROMPTS, params, num_beams=2)
    assert serving.misses == 0


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_cancelled(steps):
    serving = engine()
    name = serving.add(PROMPTS[2], greedy(), beams=BeamOptions(4, num_return=2))
    for _ in range(steps):
        assert serving.step() == []
    assert serving.cancel(name)
    ended = finish(serving)
    assert [delta.finish_reason for delta in ended.values()] == ["cancelled"] * 2
    assert [len(delta.output.token_ids) for delta in ended.values()] == [steps] * 2
    assert all((delta.output.score is None) == (steps == 0) for delta in ended.values())
    assert not serving.cancel(name) and nothing_left(serving)


def test_a_deadline_brings_the_best_so_far():
    now = [0.0]
    serving = Engine(
        models("llama")[0], EngineConfig(**SIZES, compile_ahead=False), clock=lambda: now[0]
    )
    serving.add(PROMPTS[0], greedy(), beams=BeamOptions(3), deadline_s=5)
    for _ in range(4):
        serving.step()
    now[0] = 6.0
    (delta,) = finish(serving).values()
    assert delta.finish_reason == "deadline" and nothing_left(serving)
    expected = one().beam_search(PROMPTS[:1], greedy(max_new_tokens=4), num_beams=3)
    assert delta.token_ids == tuple(expected[0].token_ids)
    assert math.isclose(delta.output.score, expected[0].score, abs_tol=1e-5)


def test_stream():
    async def read():
        beams = BeamOptions(3, num_return=2)
        return [delta async for delta in engine().stream(PROMPTS[0], greedy(), beams=beams)]

    deltas = asyncio.run(read())
    expected = one().beam_search(PROMPTS[:1], greedy(), num_beams=3, num_return=2)
    agree([delta.output for delta in deltas], expected)


def test_fewer_hypotheses_than_asked_for():
    """With one token allowed there is one continuation: the second output has no score."""
    serving = one()
    name = serving.add([5], greedy(allowed_ids=(8,)), beams=BeamOptions(3, num_return=2))
    first, second = finish(serving).values()
    assert first.id == name and first.token_ids == (8,) * NEW and first.output.score is not None
    assert second.token_ids == () and second.output.score is None
    assert second.finish_reason == "stop"


def test_a_prompt_in_pieces_which_is_shared():
    serving, prompt = engine(), list(range(5, 41))
    first, again = (
        serving.beam_search([prompt], greedy(max_new_tokens=4), num_beams=4) for _ in range(2)
    )
    agree(again, first)
    assert serving.schedulers[0].statistics.hit_tokens == 32, "all whole pages"
    options = {"num_beams": 4, "num_return": 1, "max_new_tokens": 4}
    check(first, reference(models("llama")[1], [prompt], stop_ids=(), **options))


@pytest.mark.parametrize(
    "beams, changes, message",
    [
        (BeamOptions(5), {}, "num_beams=5: this engine was made for max_beams=4"),
        (BeamOptions(2), {"temperature": 0.7}, "temperature is 0.7: beam search does not sample"),
        (BeamOptions(2), {"n": 2}, "n is 2: beam search does not sample; use num_return"),
        (BeamOptions(2), {"best_of": 2}, "best_of is 2: beam search does not sample; use num_beams"),
        (BeamOptions(2), {"stop": ("x",)}, "beam search ends at ids only; use stop_ids"),
        (BeamOptions(2), {"logprobs": 1}, "logprobs is 1: beam search gives those of the chosen"),
        (BeamOptions(2), {"prompt_logprobs": 0}, "prompt_logprobs is 0: beam search does not give"),
        (BeamOptions(2), {"structured": StructuredSpec("regex", "a")}, "keeps to no form; use None"),
        (BeamOptions(2), {"stop_ids": tuple(range(17))}, "are 17 ids: a search takes 16"),
        (BeamOptions(4), {"max_new_tokens": 30}, "4 beams of 35 tokens need 20 pages"),
    ],
)
def test_what_is_refused(beams, changes, message):
    serving = engine(pages=(20,))
    with pytest.raises(ValueError, match=message):
        serving.add(PROMPTS[0], greedy(**changes), beams=beams)
    assert nothing_left(serving)


def test_engines_without_searches_refuse_them():
    with pytest.raises(ValueError, match="num_beams=2: this engine was made for max_beams=0"):
        engine(max_beams=0).beam_search(PROMPTS, greedy(), num_beams=2)
    with pytest.raises(ValueError, match="expected a list of prompts"):
        one().beam_search("text", greedy(), num_beams=2)
    for value in (-1, 9):
        with pytest.raises(ValueError, match=f"max_beams={value}: expected 0 to max_rows=8"):
            EngineConfig(max_rows=8, max_beams=value)
