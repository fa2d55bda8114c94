"""Speculation: bit for bit plain decoding, and the distribution of the model."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from llm_jax.ops import sampling
from llm_jax.ops.sampling import SAMPLED
from llm_jax.ops.sampling_params import SamplingParams
from llm_jax.ops.speculation import speculative_accept

V, K = 8, 3
FAST = {"xla_backend_optimization_level": 1}
sample = jax.jit(sampling.sample, static_argnames="features", compiler_options=FAST)
speculate = jax.jit(speculative_accept, static_argnames="features", compiler_options=FAST)

ROWS = [
    SamplingParams(seed=7, temperature=0),
    SamplingParams(seed=8, temperature=0, frequency_penalty=1.5, presence_penalty=0.5),
    SamplingParams(seed=1),
    SamplingParams(seed=2, temperature=0.7, top_k=4, top_p=0.9, typical_p=0.95),
    SamplingParams(seed=3, repetition_penalty=1.7, frequency_penalty=1.0),
    SamplingParams(seed=4, logit_bias={2: 3.0}, min_new_tokens=5),
    SamplingParams(seed=5, allowed_ids=(0, 3, 5), logprobs=2),
    SamplingParams(seed=6, banned_ids=(1, 2), min_p=0.05, presence_penalty=2.0),
]


def pack(params, stop_ids=(), **packing):
    return sampling.pack(
        params,
        [[1, 2]] * len(params),
        vocab_size=V,
        sample_index=[0] * len(params),
        stop_ids=[stop_ids] * len(params),
        default_seed=0,
        **packing,
    )


def table(seed, scale=1.5):
    """A model whose logits depend on the newest token: [V, V]."""
    return np.random.default_rng(seed).normal(0, scale, (V, V)).astype(np.float32)


def decode(params, logits, length, stop_ids=()):
    """Plain decoding after token 0: tokens [B, length], log probabilities and the last state."""
    state, features = pack(params, stop_ids)
    newest, tokens, logprobs = np.zeros(len(params), np.int32), [], []
    for _ in range(length):
        sampled, state = sample(logits[newest], state, features)
        newest = np.asarray(sampled.tokens)
        tokens.append(newest)
        logprobs.append(sampled.logprob)
    found = None if logprobs[0] is None else np.stack(logprobs, 1)
    return np.stack(tokens, 1), found, state


def rounds(params, logits, length, propose, stop_ids=()):
    """Speculative decoding until every row has `length` tokens.

    Returns tokens and log probabilities, [B, length], and the share of drafts that were accepted.

    propose(newest [B], done [B]) -> drafts [B, K], their number [B].
    """
    state, features = pack(params, stop_ids)
    rows, newest = np.arange(len(params)), np.zeros(len(params), np.int32)
    done = np.zeros(len(params), np.int32)
    texts = np.full((len(params), (K + 1) * length), -1)
    values = np.zeros(texts.shape, np.float32)
    drafted = stayed = 0
    while done.min() < length:
        drafts, counts = propose(newest, done)
        target = logits[np.concatenate([newest[:, None], drafts], 1)]
        results = speculate(drafts, counts, target, state, features)
        accepted, sampled, state = jax.tree.map(np.asarray, results)
        kept = np.arange(K + 1) <= accepted[:, None]
        np.testing.assert_array_equal(sampled.tokens >= 0, kept)
        row, place = np.nonzero(kept)
        texts[row, done[row] + place] = sampled.tokens[kept]
        if sampled.logprob is not None:
            values[row, done[row] + place] = sampled.logprob[kept]
        drafted, stayed = drafted + counts.sum(), stayed + accepted.sum()
        done, newest = done + accepted + 1, sampled.tokens[rows, accepted]
    np.testing.assert_array_equal(state.step, done)
    if features.penalties:
        histograms = np.sum(texts[:, :, None] == np.arange(V), axis=1)
        np.testing.assert_array_equal(state.counts, histograms)
    return texts[:, :length], values[:, :length], stayed / drafted


@pytest.mark.parametrize("chance", [0.0, 0.7, 1.0])
def test_a_deterministic_proposer_changes_no_bit(chance):
    """Drafts that are right with some probability, of every length, for rows of every kind."""
    logits, length = table(0), 24
    expected, logprobs, _ = decode(ROWS, logits, length + K + 1, stop_ids=[2, 6])
    rng = np.random.default_rng(1)

    def propose(newest, done):
        ahead = np.stack([expected[b, n : n + K] for b, n in enumerate(np.minimum(done, length))])
        wrong = rng.random(ahead.shape) >= chance
        return np.where(wrong, (ahead + 1) % V, ahead), rng.integers(0, K + 1, len(ROWS))

    texts, values, accepted = rounds(ROWS, logits, length, propose, stop_ids=[2, 6])
    np.testing.assert_array_equal(texts, expected[:, :length])
    np.testing.assert_array_equal(values, logprobs[:, :length])
    assert (accepted > 0.8) == (chance == 1)  # rows that are done early draft what is not known


def drawing(params, logits, seed=None):
    """A proposer that draws from a model of its own: with the rows' random numbers, or other ones."""
    streams = (
        params if seed is None else [dataclasses.replace(p, seed=seed + i) for i, p in enumerate(params)]
    )
    state, features = pack(streams)

    def propose(newest, done):
        drafts, at = [], newest
        for place in range(K):
            there = dataclasses.replace(state, step=(done + place).astype(np.int32))
            at = np.asarray(sample(logits[at], there, features)[0].tokens)
            drafts.append(at)
        return np.stack(drafts, 1), np.full(len(params), K)

    return propose


def test_drafts_of_the_same_random_numbers_are_right_more_often():
    """(1 - d) / (1 + d) of them at least, with d the distance of the distributions."""
    rows, length = 400, 30
    params = [SamplingParams(seed=s) for s in range(rows)]
    logits = table(2)
    near = logits + np.random.default_rng(3).normal(0, 0.4, logits.shape).astype(np.float32)
    expected, _, _ = decode(params, logits, length)
    shares = {}
    for name, seed in (("same", None), ("other", 10**6)):
        texts, _, shares[name] = rounds(params, logits, length, drawing(params, near, seed))
        np.testing.assert_array_equal(texts, expected)
    p, q = (scipy.special.softmax(x, axis=-1) for x in (logits, near))
    distance = np.abs(p - q).sum(axis=-1).max() / 2
    # Of K drafts the prefix counts: rate (a + a^2 + ...) / K.
    least = (1 - distance) / (1 + distance)
    assert shares["same"] > sum(least**n for n in range(1, K + 1)) / K
    assert shares["same"] > 1.5 * shares["other"]


def exact(params, logits, length):
    """The probability of every text of `length` tokens after token 0: [V] * length."""
    state, features = pack([params])
    joint = np.ones(())
    for position in range(length):
        histories = np.array(list(itertools.product(range(V), repeat=position)), np.int32)
        histories = histories.reshape(V**position, position)
        rows = jax.tree.map(lambda x: np.repeat(x, len(histories), 0), state)  # noqa: B023
        if features.penalties:
            counts = np.stack([np.bincount(h, minlength=V) for h in histories]).astype(np.int32)
            rows = dataclasses.replace(rows, counts=counts)
        newest = histories[:, -1] if position else np.zeros(1, np.int32)
        processed = sampling.process_logits(jnp.asarray(logits[newest]), rows, features)
        drawn = np.asarray(sampling.draw_logits(processed, rows, features), np.float64)
        joint = joint[..., None] * scipy.special.softmax(drawn, -1).reshape(*[V] * position, V)
    return joint


PLAIN = SamplingParams(temperature=1.3)
RICH = SamplingParams(top_p=0.9, frequency_penalty=0.7, repetition_penalty=1.2, banned_ids=(3,))


@pytest.mark.parametrize("params", [PLAIN, RICH])
def test_tokens_follow_the_distribution_of_the_model(params):
    """Chi-square on the first, second and third token, and on all three together, of 20000 rows."""
    rows, length = 20000, 3
    logits = table(4, 0.8)
    texts, _, accepted = rounds([params] * rows, logits, length, drawing([params] * rows, table(5, 0.8)))
    assert 0.03 < accepted < 0.9  # both branches are met
    joint = exact(params, logits, length)
    seen = np.zeros_like(joint)
    np.add.at(seen, tuple(texts.T), 1)
    assert seen[joint == 0].sum() == 0
    for axes in ((1, 2), (0, 2), (0, 1), ()):
        expected, found = joint.sum(axes).ravel() * rows, seen.sum(axes).ravel()
        rare = expected < 5  # pooled, or chi-square's approximation would not hold
        pooled = [np.append(x[~rare], x[rare].sum()) for x in (found, expected)]
        found, expected = (x[pooled[1] > 0] for x in pooled)
        assert scipy.stats.chisquare(found, expected).pvalue > 1e-3, (axes, found, expected)


def one_round(params, drafts, counts):
    target = table(7)[np.concatenate([np.zeros((len(params), 1), np.int32), drafts], 1)]
    state, features = pack(params, stop_ids=[2, 6])
    return speculate(drafts, counts, target, state, features)


def test_results_do_not_depend_on_the_batch():
    """Rows in another order, beside others, give the same."""
    drafts, _ = drawing(ROWS, table(9))(np.zeros(len(ROWS), np.int32), np.zeros(len(ROWS), np.int32))
    counts = np.arange(len(ROWS)) % (K + 1)
    order = np.array([3, 0, 7, 7, 1, 5, 6, 2])
    expected = one_round(ROWS, drafts, counts)
    got = one_round([ROWS[i] for i in order], drafts[order], counts[order])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[order]), got, expected)


def test_a_row_without_a_draft_gets_what_sample_gives():
    state, features = pack(ROWS, stop_ids=[2, 6])
    expected, after = sample(table(7)[np.zeros(len(ROWS), np.int32)], state, features)
    drafts, counts = np.zeros((len(ROWS), K), np.int32), np.zeros(len(ROWS), np.int32)
    accepted, sampled, then = one_round(ROWS, drafts, counts)
    assert not np.asarray(accepted).any()
    for name in ("tokens", "logprob", "top_ids", "top_logprobs"):
        np.testing.assert_array_equal(getattr(sampled, name)[:, 0], getattr(expected, name))
    jax.tree.map(np.testing.assert_array_equal, then, after)


def test_every_place_has_its_own_mask():
    """A form that allows token i at place i only; the drafts follow it, then break it."""
    params = [SamplingParams(seed=1), SamplingParams(temperature=0)] * 2
    masks = np.tile(np.uint32([[1], [2], [4], [8]]), (4, 1, 1))
    drafts = np.array([[0, 1, 2], [0, 1, 2], [0, 5, 2], [4, 1, 2]], np.int32)
    state, _ = pack([*params[:3], dataclasses.replace(params[3], allowed_ids=range(V))])
    features = dataclasses.replace(SAMPLED, mask=True)
    logits = np.zeros((4, K + 1, V), np.float32)
    accepted, sampled, _ = speculate(drafts, np.full(4, K), logits, state, features, masks=masks)
    np.testing.assert_array_equal(accepted, [3, 3, 1, 0])
    expected = [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, -1, -1], [0, -1, -1, -1]]
    np.testing.assert_array_equal(sampled.tokens, expected)
