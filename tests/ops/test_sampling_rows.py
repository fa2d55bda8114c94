"""Rows that come and go: a table on the host, tiers of features, histories on the device."""

import dataclasses

import jax
import numpy as np
import pytest

from llm_jax.ops import sampling
from llm_jax.ops.sampling import EVERYTHING, GREEDY, SAMPLED, TIERS, SamplingFeatures, tier_of
from llm_jax.ops.sampling_params import SamplingParams, StructuredSpec

V, SLOTS = 40, 6
FAST = {"xla_backend_optimization_level": 1}
sample = jax.jit(sampling.sample, static_argnames="features", compiler_options=FAST)
write_history = jax.jit(sampling.write_history)

REQUESTS = [
    SamplingParams(seed=0, temperature=0),
    SamplingParams(seed=1),
    SamplingParams(seed=2, temperature=0.3),
    SamplingParams(seed=3, temperature=1.4, n=2),
    SamplingParams(seed=4, top_k=5, top_p=0.9, min_p=0.02, typical_p=0.8, logprobs=3),
    SamplingParams(seed=5, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2),
    SamplingParams(seed=6, temperature=0, logit_bias={3: 4.0, 9: -2.0}, logprobs=0),
    SamplingParams(seed=7, min_new_tokens=4, banned_ids=(1, 2), allowed_ids=range(30)),
]
PLAIN = [p for p in REQUESTS if SAMPLED.covers(SamplingFeatures.of([p]))]


def fill(table, rows, requests, **changes):
    for row, request in zip(rows, requests, strict=True):
        options = {"vocab_size": V, "sample_index": 0, "stop_ids": (5, 6), "default_seed": 0}
        sampling.pack_row(table, row, request, [1, 8], **options | {"stream": row} | changes)


def steps(state, features, logits):
    """What several steps of `sample` give, as numpy."""
    results = []
    for step_logits in logits:
        sampled, state = sample(step_logits, state, features)
        results.append(sampled)
    return jax.tree.map(lambda *x: np.stack(x), *results), state


def logits_of(rows, length=5, seed=0):
    return np.random.default_rng(seed).normal(0, 2, (length, rows, V)).astype(np.float32)


def test_the_table_gives_what_pack_gives():
    """Bit for bit, though the table is wider, has all features, and its rows held others before."""
    table = sampling.new_rows(SLOTS + len(REQUESTS), V, EVERYTHING)
    rows = np.array([9, 0, 4, 13, 2, 7, 5, 1])
    fill(table, rows, REQUESTS[::-1])
    fill(table, rows, REQUESTS)
    logits = logits_of(len(REQUESTS))
    state, features = sampling.pack(
        REQUESTS,
        [[1, 8]] * len(REQUESTS),
        vocab_size=V,
        sample_index=[0] * len(REQUESTS),
        stop_ids=[(5, 6)] * len(REQUESTS),
        default_seed=0,
    )
    expected, _ = steps(state, features, logits)
    got, _ = steps(sampling.take_rows(table, rows, EVERYTHING), EVERYTHING, logits)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.logprob, expected.logprob)
    np.testing.assert_array_equal(got.top_ids[..., :3], expected.top_ids)
    np.testing.assert_array_equal(got.top_logprobs[..., :3], expected.top_logprobs)


@pytest.mark.parametrize("vocab", [V, 1000])
def test_every_tier_gives_a_row_the_same_bits(vocab):
    """Greedy rows by all three tiers, sampled ones by two, beside rows that need the last."""
    logits = np.random.default_rng(1).normal(0, 3, (4, len(PLAIN), vocab)).astype(np.float32)
    logits[:, :, :7] = logits[:, :, 7:14]  # ties
    logits[0] = np.round(logits[0])
    table = sampling.new_rows(len(PLAIN), vocab, EVERYTHING)
    for row, request in enumerate(PLAIN):
        options = {"vocab_size": vocab, "sample_index": 0, "stop_ids": (), "default_seed": 0}
        sampling.pack_row(table, row, request, **options, stream=row)
    found = {
        tier: steps(sampling.take_rows(table, slice(None), tier), tier, logits)[0] for tier in TIERS
    }
    np.testing.assert_array_equal(found[SAMPLED].tokens, found[EVERYTHING].tokens)
    greedy = [p.greedy for p in PLAIN]
    np.testing.assert_array_equal(found[GREEDY].tokens[:, greedy], found[SAMPLED].tokens[:, greedy])
    assert found[SAMPLED].logprob is None
    assert found[EVERYTHING].top_ids.shape == (4, len(PLAIN), 20)


def test_rows_without_a_request_are_greedy_and_cost_no_pass():
    table = sampling.new_rows(3, V, EVERYTHING)
    logits = logits_of(3, length=2)
    got, _ = steps(sampling.take_rows(table, slice(None), EVERYTHING), EVERYTHING, logits)
    np.testing.assert_array_equal(got.tokens, logits.argmax(-1))
    request = SamplingParams(top_k=3, repetition_penalty=2, logit_bias={1: 1}, banned_ids=(2,))
    before = jax.tree.map(np.copy, table)
    fill(table, [1], [request])
    fill(table, [1], [SamplingParams(temperature=0)])
    for name in ("top_k", "repetition_penalty", "bias_ids", "bias_values", "forbidden_ids"):
        np.testing.assert_array_equal(getattr(table, name), getattr(before, name))
    assert set(np.unpackbits(table.mask[1].view(np.uint8), bitorder="little")[:V]) == {1}


def test_rows_are_copied_with_only_the_fields_of_their_tier():
    table = sampling.new_rows(SLOTS, V, EVERYTHING, history=False)
    assert table.counts is None and table.in_prompt is None
    plain = sampling.take_rows(table, slice(2, 4), SAMPLED)
    assert plain.mask is None and plain.bias_ids is None and plain.forbidden_ids is None
    everything = sampling.take_rows(table, [1, 3, 5], EVERYTHING)
    assert everything.mask.shape == (3, 2) and everything.bias_ids.shape == (3, 300)
    table.temperature[:] = 9
    assert not plain.temperature.any() and not everything.temperature.any()


def test_a_row_can_go_on_where_it_was():
    """As after it was evicted: the step and the history are written back."""
    request = SamplingParams(seed=5, repetition_penalty=1.6, frequency_penalty=0.4)
    logits = logits_of(1, length=8)
    table = sampling.new_rows(1, V, EVERYTHING)
    fill(table, [0], [request])
    expected, _ = steps(sampling.take_rows(table, [0], EVERYTHING), EVERYTHING, logits)
    tokens = expected.tokens[:4, 0]

    table = sampling.new_rows(3, V, EVERYTHING, history=False)
    fill(table, [2], [request])
    table.step[2] = 4
    history = np.full((2, 9), V, np.int32)
    history[0, :6] = [1, 8, *tokens]
    counts, in_prompt = np.full((3, V), 7, np.int32), np.ones((3, V), bool)
    counts, in_prompt = write_history(counts, in_prompt, np.array([2, 3]), history, np.array([2, 0]))
    np.testing.assert_array_equal(counts[:2], 7)  # of other rows
    state = sampling.take_rows(table, slice(None), EVERYTHING)
    state = dataclasses.replace(state, counts=counts, in_prompt=in_prompt)
    state = jax.tree.map(lambda x: x[2:], state)
    got, _ = steps(state, EVERYTHING, logits[4:])
    np.testing.assert_array_equal(got.tokens, expected.tokens[4:])


@pytest.mark.parametrize(
    ("params", "tier"),
    [
        ([SamplingParams(temperature=0, top_k=3)], GREEDY),
        ([SamplingParams(temperature=0), SamplingParams()], SAMPLED),
        ([SamplingParams(top_p=0.9)], EVERYTHING),
        ([SamplingParams(temperature=0, banned_ids=(1,))], EVERYTHING),
        ([SamplingParams(temperature=0, structured=StructuredSpec("json", "{}"))], EVERYTHING),
        ([SamplingParams(temperature=0, logprobs=0)], EVERYTHING),
        ([SamplingParams(temperature=0, best_of=2).candidates()], EVERYTHING),
        ([], GREEDY),
    ],
)
def test_the_tier_of_requests(params, tier):
    assert tier_of(params) == tier


def test_what_covers_what():
    for i, tier in enumerate(TIERS):
        assert [tier.covers(other) for other in TIERS] == [j <= i for j in range(3)]
    some = dataclasses.replace(EVERYTHING, logprobs=0)
    assert EVERYTHING.covers(some) and not some.covers(EVERYTHING)
    assert not dataclasses.replace(EVERYTHING, mask=False).covers(some)
    with pytest.raises(ValueError, match=r"SamplingParams\.logprobs is 21: expected at most 20"):
        tier_of([SamplingParams(logprobs=21)])


@pytest.mark.parametrize(
    ("request_", "changes", "message"),
    [
        (SamplingParams(logit_bias={i: 1.0 for i in range(5)}), {}, "logit_bias has 5 ids.*most 4"),
        (SamplingParams(min_new_tokens=1), {"stop_ids": range(4)}, "stop_ids has 4 ids.*most 3"),
        (SamplingParams(seed=1), {"default_seed": -1}, "default_seed is -1"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(request_, changes, message):
    table = sampling.new_rows(1, V, EVERYTHING, bias_width=4, stop_width=3)
    with pytest.raises(ValueError, match=message):
        fill(table, [0], [request_], **changes)
    fill(table, [0], [SamplingParams()], stop_ids=range(4))  # without min_new_tokens none is forbidden


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("yaml", "a: b", "StructuredSpec.kind is 'yaml': expected one of json, regex, choice, ebnf"),
        ("json", "", "StructuredSpec.text is ''"),
        ("json", {}, "StructuredSpec.text is {}"),
    ],
)
def test_a_form_is_checked(kind, text, message):
    with pytest.raises(ValueError, match=message):
        StructuredSpec(kind, text)
