"""Sampling against transformers' processors, the OpenAI formula, float64 numpy and chi-square."""

import dataclasses
import math
from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import transformers

from llm_jax.ops import sampling
from llm_jax.ops.sampling import SamplingParams

V = 61
# LLVM's optimiser is most of what a compile with random bits costs; XLA's own passes stay on.
FAST = {"xla_backend_optimization_level": 1}
sample = jax.jit(sampling.sample, static_argnames="features", compiler_options=FAST)
process_logits = jax.jit(sampling.process_logits, static_argnames="features")
filter_logits = jax.jit(sampling.filter_logits)


@pytest.fixture(scope="module", autouse=True)
def strict_numpy():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def pack(params, prompts=None, vocab_size=V, sample_index=None, stop_ids=None, default_seed=0):
    """`sampling.pack` with an empty prompt, sample 0 and no stop ids where none are given."""
    return sampling.pack(
        params,
        [()] * len(params) if prompts is None else prompts,
        vocab_size=vocab_size,
        sample_index=[0] * len(params) if sample_index is None else sample_index,
        stop_ids=[()] * len(params) if stop_ids is None else stop_ids,
        default_seed=default_seed,
    )


def random_logits(seed, rows, vocab_size=V, scale=3.0):
    return np.random.default_rng(seed).normal(0, scale, (rows, vocab_size)).astype(np.float32)


def run(params, logits, **packing):
    """Samples once per step of logits [T, B, V]; returns the tokens [T, B] and the last state."""
    state, features = pack(params, vocab_size=logits.shape[-1], **packing)
    tokens = []
    for step_logits in logits:
        sampled, state = sample(step_logits, state, features)
        tokens.append(np.asarray(sampled.tokens))
    return np.stack(tokens), state, features


def reference_processors(params, prompt_length=0, stop_ids=()):
    """transformers' processors for one request, in the order its `generate` puts them."""
    processors = transformers.LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(
            transformers.RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))
        )
    if params.min_new_tokens:
        processors.append(
            transformers.MinNewTokensLengthLogitsProcessor(
                prompt_length, params.min_new_tokens, list(stop_ids)
            )
        )
    if not params.greedy and params.temperature != 1:
        processors.append(transformers.TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        processors.append(transformers.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(transformers.TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(transformers.MinPLogitsWarper(params.min_p))
    if params.typical_p < 1:
        processors.append(transformers.TypicalLogitsWarper(params.typical_p))
    return processors


def reference_row(params, ids, logits, **kwargs):
    processors = reference_processors(params, **kwargs)
    ids = torch.tensor([list(ids)], dtype=torch.long)
    return processors(ids, torch.tensor(logits)[None])[0].numpy()


# --- Each processor against its reference ---


def test_repetition_penalty_matches_transformers_over_prompt_and_generated():
    penalties = [1.0, 1.3, 0.7, 2.0]
    prompts = [[5, 5, 9], [0, V - 1], [3], [1, 2, 3, 4]]
    params = [SamplingParams(temperature=0, repetition_penalty=p) for p in penalties]
    steps = np.stack([random_logits(s, 4) for s in range(5)])
    tokens, state, features = run(params, steps[:4], prompts=prompts)
    got = process_logits(steps[4], state, features)
    for row, (p, prompt) in enumerate(zip(params, prompts, strict=True)):
        expected = reference_row(p, prompt + list(tokens[:, row]), steps[4, row])
        np.testing.assert_allclose(got[row], expected, rtol=1e-6)


def test_presence_and_frequency_penalties_follow_the_openai_formula():
    presence, frequency = [0.0, 0.5, -1.0, 2.0], [0.0, 0.25, 1.5, -0.5]
    pairs = zip(presence, frequency, strict=True)
    params = [SamplingParams(temperature=0, presence_penalty=p, frequency_penalty=f) for p, f in pairs]
    # Peaked logits repeat tokens; the prompt must not count.
    steps = np.stack([random_logits(s % 2, 4, scale=20) for s in range(7)])
    tokens, state, features = run(params, steps[:6], prompts=[[1, 2, 3]] * 4)
    got = process_logits(steps[6], state, features)
    for row in range(4):
        counts = np.bincount(tokens[:, row], minlength=V)
        assert counts.max() > 1
        expected = steps[6, row] - counts * frequency[row] - (counts > 0) * presence[row]
        np.testing.assert_allclose(got[row], expected, rtol=1e-6, atol=1e-6)


def test_logit_bias_matches_transformers_sequence_bias():
    biases = [{}, {3: 2.5}, {0: -4.0, V - 1: 100.0, 7: 0.5}]
    params = [SamplingParams(logit_bias=b) for b in biases]
    state, features = pack(params)
    logits = random_logits(0, 3)
    got = process_logits(logits, state, features)
    np.testing.assert_array_equal(got[0], logits[0])
    for row in (1, 2):
        bias = {(token,): value for token, value in biases[row].items()}
        reference = transformers.SequenceBiasLogitsProcessor(bias)
        expected = reference(torch.zeros(1, 1, dtype=torch.long), torch.tensor(logits[row])[None])
        np.testing.assert_allclose(got[row], expected[0], rtol=1e-6)


def test_an_infinite_negative_bias_bans_a_token():
    params = SamplingParams(logit_bias=((0, -math.inf), (2, -math.inf)), temperature=0)
    tokens, _, _ = run([params], np.array([[[9.0, 1.0, 8.0]]], np.float32))
    assert tokens[0, 0] == 1


def test_banned_and_allowed_ids_match_transformers():
    rows = [((3, 60), None), ((), (0, 31, 32, 60)), ((31,), (31, 32)), ((), None)]
    params = [SamplingParams(banned_ids=banned, allowed_ids=allowed) for banned, allowed in rows]
    state, features = pack(params)
    logits = random_logits(6, 4)
    got = process_logits(logits, state, features)
    for row, (banned, allowed) in enumerate(rows):
        left_out = set(banned) | (set(range(V)) - set(range(V) if allowed is None else allowed))
        suppress = transformers.SuppressTokensLogitsProcessor(sorted(left_out))
        expected = suppress(torch.zeros(1, 1, dtype=torch.long), torch.tensor(logits[row])[None])
        np.testing.assert_array_equal(got[row], expected[0])


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 100])
def test_a_mask_has_one_bit_for_each_token(vocab):
    rng = np.random.default_rng(vocab)
    logits, allowed = random_logits(0, 3, vocab), rng.random((3, vocab)) < 0.5
    words = np.zeros((3, -(-vocab // 32)), np.uint32)
    for row, token in np.argwhere(allowed):
        words[row, token // 32] |= np.uint32(1) << np.uint32(token % 32)
    expected = np.where(allowed, logits, -np.inf)
    np.testing.assert_array_equal(sampling.mask_logits(jnp.asarray(logits), words), expected)


def test_min_new_tokens_matches_transformers_at_every_step():
    minima, stops = [0, 2, 3], [[4], [4, 9, 11], [V - 1]]
    params = [SamplingParams(min_new_tokens=m, temperature=0) for m in minima]
    state, features = pack(params, stop_ids=stops)
    generated = [[], [], []]
    for step in range(5):
        logits = random_logits(step, 3)
        got = process_logits(logits, state, features)
        for row in range(3):
            kwargs = {"prompt_length": 0, "stop_ids": stops[row]}
            expected = reference_row(params[row], generated[row], logits[row], **kwargs)
            np.testing.assert_array_equal(got[row], expected)
        sampled, state = sample(logits, state, features)
        for row, token in enumerate(np.asarray(sampled.tokens)):
            generated[row].append(token)


@pytest.mark.parametrize("filters", ["top_k", "top_p", "min_p", "typical_p", "all"])
def test_filters_match_transformers_with_ragged_parameters(filters):
    rng = np.random.default_rng(1)
    rows = 80
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
    params = []
    for row in range(rows):
        drawn = {
            "top_k": int(rng.integers(0, V + 20)),
            "top_p": float(rng.choice([rng.uniform(), 0.0, 1.0, 0.999])),
            "min_p": float(rng.choice([rng.uniform(), 0.0, 1.0, 0.01])),
            "typical_p": float(rng.choice([rng.uniform(), 0.1, 1.0, 0.95])),
        }
        chosen = drawn if filters == "all" else {**off, filters: drawn[filters]}
        params.append(SamplingParams(temperature=0.3 + row / rows, **chosen))
    logits = random_logits(2, rows)
    state, _ = pack(params)
    scaled = logits / state.temperature[:, None]
    got = filter_logits(scaled, state.top_k, state.top_p, state.min_p, state.typical_p)
    for row, p in enumerate(params):
        expected = reference_row(p, [0], logits[row])
        np.testing.assert_allclose(got[row], expected, rtol=1e-6, err_msg=str(p))


# --- The draw ---

MIXES = {
    "plain": SamplingParams(),
    "hot": SamplingParams(temperature=2.5),
    "cold": SamplingParams(temperature=0.4),
    "top_k": SamplingParams(top_k=4),
    "top_p": SamplingParams(top_p=0.7, temperature=1.5),
    "min_p": SamplingParams(min_p=0.15),
    "typical_p": SamplingParams(typical_p=0.5, temperature=1.2),
    "unfiltered": SamplingParams(repetition_penalty=1.8, temperature=1.2, min_new_tokens=1),
    "all": SamplingParams(
        temperature=1.7,
        top_k=8,
        top_p=0.95,
        min_p=0.05,
        typical_p=0.9,
        repetition_penalty=1.5,
        min_new_tokens=2,
    ),
}


@pytest.mark.parametrize("mix", MIXES)
def test_draws_follow_the_distribution_of_transformers_processors(mix):
    """Chi-square over 300 rows of 40 steps each, so across streams as well as along them."""
    params, vocab, rows, steps = MIXES[mix], 12, 300, 40
    logits = random_logits(3, 1, vocab, scale=0.8)
    prompt, stop_ids = [1, 2, int(logits.argmax())], [0, 5]
    state, features = pack(
        [params] * rows, [prompt] * rows, vocab_size=vocab, stop_ids=[stop_ids] * rows
    )
    batch = np.repeat(logits, rows, 0)
    # Steps past min_new_tokens would lift the ban, so forbid throughout.
    state = dataclasses.replace(state, min_new_tokens=state.min_new_tokens * steps)
    tokens = []
    for step in range(steps):  # the history stays that of the first step; only the stream moves on
        now = dataclasses.replace(state, step=np.full(rows, step, np.int32))
        tokens.append(sample(batch, now, features)[0].tokens)
    tokens = np.stack(tokens)
    scores = reference_row(params, prompt, logits[0], prompt_length=3, stop_ids=stop_ids)
    expected = scipy.special.softmax(scores.astype(np.float64))
    counts = np.bincount(tokens.ravel(), minlength=vocab)
    possible = expected > 0
    assert possible.sum() > 1 and counts[~possible].sum() == 0
    result = scipy.stats.chisquare(counts[possible], expected[possible] * tokens.size)
    assert result.pvalue > 1e-3, (mix, counts, expected * tokens.size)


def test_presence_frequency_and_bias_draws_follow_the_formula():
    vocab, rows = 8, 12000
    params = SamplingParams(
        presence_penalty=0.8, frequency_penalty=0.3, logit_bias={6: 1.0}, temperature=1.3
    )
    logits = random_logits(4, 1, vocab, scale=1.0)
    history = np.array([0, 2, 0, 1, 0, 0, 0, 3], np.int32)
    state, features = pack([params] * rows, vocab_size=vocab)
    state = dataclasses.replace(state, counts=np.tile(history, (rows, 1)))
    sampled, _ = sample(np.repeat(logits, rows, 0), state, features)
    scores = logits[0] - 0.3 * history - 0.8 * (history > 0) + np.eye(vocab)[6]
    expected = scipy.special.softmax(scores / 1.3)
    counts = np.bincount(np.asarray(sampled.tokens), minlength=vocab)
    assert scipy.stats.chisquare(counts, expected * rows).pvalue > 1e-3


def test_same_seed_gives_same_tokens_whatever_the_batch():
    """Alone or beside rows that switch on every feature, at any position, any default seed."""
    tracked = [
        SamplingParams(seed=7, temperature=1.1),
        SamplingParams(seed=8, top_k=9, top_p=0.9, repetition_penalty=1.2),
    ]
    logits = np.stack([random_logits(s, 2) for s in range(12)])  # [T, 2, V]
    alone = [run([tracked[i]], logits[:, i : i + 1])[0][:, 0] for i in range(2)]
    others = [
        SamplingParams(temperature=0),
        SamplingParams(seed=7, min_p=0.1, logprobs=2),
        SamplingParams(logit_bias={1: 5.0}, min_new_tokens=4, presence_penalty=1.0),
    ]
    for position in range(4):
        batch = others[:position] + tracked + others[position:]
        together = np.stack([random_logits(100 + s, 5) for s in range(12)])
        together[:, position : position + 2] = logits
        tokens, _, _ = run(batch, together, default_seed=position, stop_ids=[[3]] * 5)
        np.testing.assert_array_equal(tokens[:, position], alone[0])
        np.testing.assert_array_equal(tokens[:, position + 1], alone[1])


def test_samples_seeds_rows_and_default_seeds_have_streams_of_their_own():
    flat = np.zeros((16, 4, V), np.float32)
    same_request, _, _ = run([SamplingParams(seed=3, n=4)] * 4, flat, sample_index=range(4))
    seeds, _, _ = run([SamplingParams(seed=s) for s in range(4)], flat)
    unseeded, _, _ = run([SamplingParams()] * 4, flat, default_seed=5)
    again, _, _ = run([SamplingParams()] * 4, flat, default_seed=5)
    other, _, _ = run([SamplingParams()] * 4, flat, default_seed=6)
    np.testing.assert_array_equal(unseeded, again)
    streams = np.concatenate([same_request, unseeded, other, seeds[:, :3]], axis=1).T
    assert len({tuple(stream) for stream in streams}) == len(streams)
    np.testing.assert_array_equal(same_request[:, 0], seeds[:, 3])


def test_greedy_rows_of_a_mixed_batch_take_the_argmax():
    params = [SamplingParams(temperature=0, top_k=9, min_p=0.5), SamplingParams(temperature=3.0)]
    logits = np.stack([random_logits(s, 2) for s in range(30)])
    tokens, _, _ = run(params, logits)
    np.testing.assert_array_equal(tokens[:, 0], logits[:, 0].argmax(-1))
    assert (tokens[:, 1] != logits[:, 1].argmax(-1)).any()


@pytest.mark.parametrize("temperature", [1e-6, 1e-5, 1e-30])
def test_tiny_temperatures_are_safe_and_take_the_argmax(temperature):
    logits = random_logits(0, 2, scale=50)
    logits[0, :10] = -np.inf
    logits[1, :10] = np.finfo(np.float32).min  # what some models mask with
    params = [SamplingParams(temperature=temperature, top_p=0.9, top_k=5, min_p=0.1)] * 2
    tokens, _, _ = run(params, logits[None])
    np.testing.assert_array_equal(tokens[0], logits.argmax(-1))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(top_k=1, top_p=0.0, min_p=1.0),
        SamplingParams(top_p=0.5),
        SamplingParams(temperature=0),
    ],
)
def test_rows_with_one_or_no_finite_logit(params):
    logits = np.full((2, V), -np.inf, np.float32)
    logits[0, 17] = -5.0
    tokens, _, _ = run([params] * 2, logits[None])
    np.testing.assert_array_equal(tokens[0], [17, 0])


def test_sharded_logits_give_the_same_tokens():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    params = [
        SamplingParams(seed=0, top_k=20, top_p=0.9, repetition_penalty=1.2),
        SamplingParams(seed=1, logit_bias={3: 1.0}, min_new_tokens=2),
        SamplingParams(temperature=0, logprobs=3),
        SamplingParams(seed=2),
    ]
    logits = random_logits(0, 4, vocab_size=64)
    state, features = pack(params, vocab_size=64, stop_ids=[[1]] * 4)
    expected, _ = sample(logits, state, features)
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=auto)
    spec = jax.sharding.PartitionSpec("data", "tensor")
    placed = jax.device_put(logits, jax.sharding.NamedSharding(mesh, spec))
    got, _ = sample(placed, state, features)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.top_ids, expected.top_ids)
    np.testing.assert_allclose(got.logprob, expected.logprob, rtol=1e-6)


# --- Log probabilities ---


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logprobs_are_of_the_raw_logits(dtype):
    """The bias forces tokens that the model itself finds unlikely."""
    params = [
        SamplingParams(temperature=0, logit_bias={17: 100.0}, logprobs=5),
        SamplingParams(temperature=0, repetition_penalty=3.0),
        SamplingParams(temperature=0, logprobs=0),
    ]
    logits = jnp.asarray(random_logits(5, 3), dtype)
    state, features = pack(params, prompts=[[1], [2], [3]])
    sampled, _ = sample(logits, state, features)
    assert sampled.tokens[0] == 17
    raw = torch.tensor(np.asarray(logits.astype(jnp.float32)))
    expected = torch.log_softmax(raw, dim=-1)
    chosen = expected[torch.arange(3), torch.tensor(np.asarray(sampled.tokens)).long()]
    np.testing.assert_allclose(sampled.logprob, chosen, rtol=1e-6, atol=1e-6)
    assert sampled.logprob.dtype == jnp.float32
    top = torch.topk(expected, 5)
    np.testing.assert_allclose(sampled.top_logprobs, top.values, rtol=1e-6, atol=1e-6)
    if dtype == jnp.float32:  # bfloat16 has ties, which the two libraries may order differently
        np.testing.assert_array_equal(sampled.top_ids, top.indices)


def test_logprobs_absent_or_without_alternatives():
    logits = random_logits(0, 1)
    sampled, _ = sample(logits, *pack([SamplingParams(temperature=0)]))
    assert sampled.logprob is None and sampled.top_ids is None and sampled.top_logprobs is None
    sampled, _ = sample(logits, *pack([SamplingParams(temperature=0, logprobs=0)]))
    assert sampled.logprob.shape == (1,) and sampled.top_ids.shape == (1, 0)


# --- What the compiled step contains ---


def primitives(jaxpr):
    """Names of all primitives of a jaxpr, inner ones included."""
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)  # a closed jaxpr holds a jaxpr
            if hasattr(inner, "eqns"):
                names |= primitives(inner)
    return names


def traced(params):
    state, features = pack(params, stop_ids=[[1]] * len(params))
    step = partial(sampling.sample, features=features)
    return jax.make_jaxpr(step)(random_logits(0, len(params)), state), state


RANDOM = {"random_bits", "random_fold_in", "random_wrap", "threefry2x32"}


def test_an_all_greedy_batch_compiles_to_an_argmax():
    params = [SamplingParams(temperature=0, top_k=5, top_p=0.5, min_p=0.1, seed=1)] * 2
    jaxpr, state = traced(params)
    names = primitives(jaxpr.jaxpr)
    assert "argmax" in names
    heavy = {"sort", "top_k", "while", "scan", "exp", "log", "div", "scatter", "scatter-add"}
    assert not names & (RANDOM | heavy)
    assert all(leaf.size <= 4 for leaf in jax.tree.leaves(state))  # nothing of size V
    lowered = sample.lower(random_logits(0, 2), *pack(params)).as_text()
    assert "sort" not in lowered and "while" not in lowered and "xor" not in lowered


def test_features_add_only_what_they_need():
    drawn, state = traced([SamplingParams()])
    assert primitives(drawn.jaxpr) & RANDOM and "while" not in primitives(drawn.jaxpr)
    assert state.counts is None and state.bias_ids is None and state.forbidden_ids is None
    filtered, _ = traced([SamplingParams(top_k=3, top_p=0.5)])
    assert "while" in primitives(filtered.jaxpr) and "sort" not in primitives(filtered.jaxpr)
    _, features = pack([SamplingParams(temperature=0, top_k=4), SamplingParams(logprobs=2)])
    assert features == dataclasses.replace(sampling.SAMPLED, logprobs=2)
    assert hash(features) == hash(dataclasses.replace(features))


def test_the_step_compiles_once_for_all_steps_and_requests():
    before = sample._cache_size()
    for biases in ({1: 1.0, 2: 2.0, 3: 3.0}, {4: 0.5, 5: 1.0, 6: 1.0, 7: 1.0}):
        state, features = pack([SamplingParams(temperature=0, logit_bias=biases)] * 5)
        state = jax.device_put(state)
        for _ in range(3):
            _, state = sample(jnp.zeros((5, V)), state, features)
    assert sample._cache_size() == before + 1


def test_sample_runs_inside_a_scan():
    params = [SamplingParams(seed=1, top_p=0.9, repetition_penalty=1.1)]
    logits = np.stack([random_logits(s, 1) for s in range(6)])
    state, features = pack(params)

    @jax.jit
    def scanned(state):
        def step(state, step_logits):
            sampled, state = sampling.sample(step_logits, state, features)
            return state, sampled.tokens

        return jax.lax.scan(step, state, jnp.asarray(logits))

    last, tokens = scanned(jax.device_put(state))
    expected, expected_last, _ = run(params, logits)
    np.testing.assert_array_equal(tokens, expected)
    jax.tree.map(np.testing.assert_array_equal, last, expected_last)


# --- Refusals ---


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("min_new_tokens", 129),
        ("min_new_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "warm"),
        ("top_k", -1),
        ("top_k", True),
        ("top_p", 1.01),
        ("min_p", -0.5),
        ("typical_p", 1.5),
        ("banned_ids", (-1,)),
        ("banned_ids", 4),
        ("allowed_ids", (1.5,)),
        ("allowed_ids", ()),
        ("best_of", 0),
        ("prompt_logprobs", -1),
        ("structured", "json"),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", None),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", ((1, 1.0), (1, 2.0))),
        ("logit_bias", (1, 2.0)),
        ("seed", -1),
        ("stop_ids", 3),
        ("stop_ids", (-3,)),
        ("stop", "end"),
        ("stop", ("",)),
        ("ignore_eos", 1),
        ("n", 0),
        ("logprobs", -1),
    ],
)
def test_params_refuse_a_bad_value_by_name(field, value):
    with pytest.raises(ValueError, match=rf"SamplingParams\.{field} is .*: expected"):
        SamplingParams(**{field: value})


def test_params_normalise_sequences_and_stay_hashable():
    params = SamplingParams(logit_bias={3: 1, 1: -2.0}, stop=["a"], stop_ids=[np.int64(4)])
    assert params.logit_bias == ((3, 1.0), (1, -2.0))
    assert params.stop == ("a",) and params.stop_ids == (4,)
    assert hash(params) == hash(dataclasses.replace(params))


@pytest.mark.parametrize(
    ("match", "params", "packing"),
    [
        ("logit_bias holds id 61", SamplingParams(logit_bias={V: 1.0}), {}),
        ("stop_ids holds id 99", SamplingParams(min_new_tokens=1), {"stop_ids": [[99]]}),
        ("prompts holds id -1", SamplingParams(repetition_penalty=2), {"prompts": [[-1]]}),
        ("logprobs is 62", SamplingParams(logprobs=V + 1), {}),
        ("prompt_logprobs is 62", SamplingParams(prompt_logprobs=V + 1), {}),
        ("allowed_ids holds id 61", SamplingParams(allowed_ids=(V,)), {}),
        ("banned_ids holds id 61", SamplingParams(banned_ids=(V,)), {}),
        ("banned_ids holds all", SamplingParams(banned_ids=range(V)), {}),
        (
            r"allowed_ids is \(3,\): expected an id that does not end",
            SamplingParams(allowed_ids=(3,), min_new_tokens=1),
            {"stop_ids": [[3]]},
        ),
        ("prompts has 2 rows: expected 1", SamplingParams(), {"prompts": [[1], [2]]}),
        ("sample_index has 0 rows", SamplingParams(), {"sample_index": []}),
        ("stop_ids has 3 rows", SamplingParams(), {"stop_ids": [[]] * 3}),
        ("default_seed is -2", SamplingParams(), {"default_seed": -2}),
    ],
)
def test_pack_refuses_by_name(match, params, packing):
    with pytest.raises(ValueError, match=match):
        pack([params], **packing)


# --- Properties ---

# Halves make exact ties common, which is where thresholds go wrong.
tied_logits = st.lists(
    st.integers(-12, 12).map(lambda i: i / 2) | st.just(-math.inf), min_size=8, max_size=8
).filter(lambda row: max(row) > -math.inf)


def kept_ids(row, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0):
    scaled = np.array([row], np.float32)
    shares = (np.float32([share]) for share in (top_p, min_p, typical_p))
    return np.isfinite(np.asarray(filter_logits(scaled, np.array([top_k], np.int32), *shares))[0])


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(row=tied_logits, top_p=st.floats(0, 1))
def test_top_p_keeps_the_smallest_set_with_the_mass(row, top_p):
    keep = kept_ids(row, top_p=top_p)
    row = np.array(row)
    probs = scipy.special.softmax(row)
    slack = 1e-6  # float32 sums
    assert probs[keep].sum() >= top_p - slack
    assert row[keep].min() > row[~keep].max(initial=-math.inf)  # likeliest first, ties together
    without_least = keep & (row > row[keep].min())
    if without_least.any() and top_p < 1:
        assert probs[without_least].sum() < top_p + slack


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(row=tied_logits, top_k=st.integers(0, 12))
def test_top_k_keeps_k_and_the_ties_of_the_last(row, top_k):
    keep = kept_ids(row, top_k=top_k)
    row = np.array(row)
    kth = np.sort(row)[::-1][min(top_k, 8) - 1] if top_k else -math.inf
    np.testing.assert_array_equal(keep, (row >= kth) & (row > -math.inf))


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(row=tied_logits, typical_p=st.floats(0, 1))
def test_typical_p_keeps_the_least_surprising_set_with_the_mass(row, typical_p):
    keep = kept_ids(row, typical_p=typical_p)
    probs = scipy.special.softmax(np.array(row))
    possible, slack = probs > 0, 1e-5
    assert keep.any() and not keep[~possible].any()
    surprisal = -np.log(probs, where=possible, out=np.full(8, np.inf))
    distance = np.abs(surprisal - scipy.stats.entropy(probs))
    assert probs[keep].sum() >= typical_p - slack
    assert distance[keep].max() <= distance[possible & ~keep].min(initial=np.inf) + slack
    without_last = keep & (distance < distance[keep].max() - slack)
    if without_last.any() and typical_p < 1:
        assert probs[without_last].sum() < typical_p + slack


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(
    row=tied_logits, top_k=st.integers(0, 12), top_p=st.floats(0, 1), min_p=st.floats(0, 1)
)
def test_the_likeliest_token_always_survives(row, top_k, top_p, min_p):
    keep = kept_ids(row, top_k, top_p, min_p)
    assert keep[np.array(row) == max(row)].all()
