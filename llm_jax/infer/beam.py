"""Beam search: for each prompt the continuations that a search of fixed width finds likeliest.

Letters: B prompts, K beams, R = B * K rows of the cache, C candidates, M longest continuation, V vocab,
E stop ids.

    logits, cache = prefill(params, cache, tokens, lengths)    one row for each prompt
    state, cache = start(logits, cache, state, penalty)        K rows for each, their first tokens
    state, cache = search(params, cache, state, penalty)       all other tokens, in one dispatch
    hypotheses = state.finished                                one transfer to the host

At each step every beam of a prompt is extended by every token, and the C best of the K * V extensions
are its candidates: a candidate that ends and is among the K best joins the finished hypotheses, and the
K best that go on are the next beams. A finished hypothesis scores its sum of log-probabilities divided
by length ** length_penalty (Wu et al., arXiv:1609.08144, with a plain power), its end id counted in the
length. These are the rules of `generate(num_beams=K, do_sample=False)` in transformers 5.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax.cache import init_cache
from llm_jax.infer.beam_options import BeamOptions, check_searchable
from llm_jax.infer.generate import CACHE_STEP, Compiled, Timing, check_lengths, pad_prompts
from llm_jax.infer.steps import make_forward, make_prefill
from llm_jax.models import Model, Params
from llm_jax.ops.sampling import SamplingFeatures, SamplingParams, SamplingState, pack, process_logits
from llm_jax.sharding import data_shards, fetch, put_batch, put_whole, shard
from llm_jax.tree import is_per_layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hypotheses:
    """K continuations of each prompt, best first. Absent ones have a score of -inf."""

    tokens: jax.Array  # [B, K, M] int32, -1 after the end
    logprobs: jax.Array  # [B, K, M] float32, of the model's own distribution
    scores: jax.Array  # [B, K] float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamState:
    """The whole search besides the cache."""

    running: Hypotheses  # the beams; scores are sums of log-probabilities after penalties and bias
    finished: Hypotheses  # scores are those sums / length ** length_penalty
    open: jax.Array  # [B] bool, whether running beams may still improve the finished ones
    length: jax.Array  # [] int32, tokens in every running beam
    budget: jax.Array  # [B] int32, most tokens of a continuation
    stop_ids: jax.Array  # [B, E] int32, padded with -1
    sampling: SamplingState  # of R rows


@functools.lru_cache(maxsize=256)
def make_start(features: SamplingFeatures, early_stopping: bool | str) -> Callable:
    """f(logits [B, V], cache of B rows, state, length_penalty []) -> (state, cache of R rows)."""

    @functools.partial(jax.jit, donate_argnames="state")
    def start(logits, cache, state, length_penalty):
        batch, beams = state.running.scores.shape
        logits = shard(jnp.repeat(logits, beams, axis=0), "batch", None)
        cache = cache.take_within(jnp.zeros((batch, beams), jnp.int32))
        state, _ = _extend(logits, state, length_penalty, features, early_stopping)
        return state, cache

    return start


@functools.lru_cache(maxsize=256)
def make_search(model: Model, features: SamplingFeatures, early_stopping: bool | str) -> Callable:
    """f(params, cache, state, length_penalty []) -> (state, cache), with every prompt closed."""
    forward = make_forward(model)

    @functools.partial(jax.jit, donate_argnames=("cache", "state"))
    def search(params, cache, state, length_penalty):
        def step(carry):
            cache, state = carry
            beams = state.running.scores.shape[1]
            newest = state.running.tokens[:, :, state.length - 1].reshape(-1)  # [R]
            logits, cache = forward(params, cache, newest)
            # Closed prompts stay where they are, or they could outgrow the cache.
            cache = cache.advance(-jnp.repeat(~state.open, beams).astype(jnp.int32))
            state, parents = _extend(logits, state, length_penalty, features, early_stopping)
            return cache.take_within(parents), state

        cache, state = jax.lax.while_loop(lambda carry: jnp.any(carry[1].open), step, (cache, state))
        return state, cache

    return search


def _extend(
    logits: jax.Array,
    state: BeamState,
    length_penalty: jax.Array,
    features: SamplingFeatures,
    early_stopping: bool | str,
) -> tuple[BeamState, jax.Array]:
    """One more token in every beam; -> (state, which beam each new one continues [B, K])."""
    beams = state.running.scores.shape[1]
    candidates, parents = _candidates(logits, state, features)
    length = state.length + 1
    newest = candidates.tokens[:, :, state.length]  # [B, C]
    ended = jnp.any(newest[:, :, None] == state.stop_ids[:, None, :], axis=-1)
    ended |= (length >= state.budget)[:, None]

    ending = jax.tree.map(lambda x: x[:, :beams], candidates)
    joins = ended[:, :beams] & state.open[:, None]
    scores = jnp.where(joins, _normalized(ending.scores, length, length_penalty), -jnp.inf)
    ending = dataclasses.replace(ending, scores=scores)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), state.finished, ending)
    finished, _ = _best(both, beams)
    going_on = jnp.where(ended, -jnp.inf, candidates.scores)
    running, chosen = _best(dataclasses.replace(candidates, scores=going_on), beams)
    parents = _gather(parents, chosen)

    reach = jnp.full_like(state.budget, length)
    if early_stopping == "never":
        reach = jnp.where(length_penalty > 0, state.budget, reach)
    hope = _normalized(running.scores[:, 0], reach, length_penalty)
    worst = finished.scores[:, -1]
    still_open = state.open & (hope > worst) & (length < state.budget)
    if early_stopping is True:
        still_open &= worst == -jnp.inf
    sampling = _continue_rows(state.sampling, parents, running.tokens[:, :, state.length])
    new = (running, finished, still_open, length, state.budget, state.stop_ids, sampling)
    return _shard_state(BeamState(*new)), parents


def _candidates(
    logits: jax.Array, state: BeamState, features: SamplingFeatures
) -> tuple[Hypotheses, jax.Array]:
    """The best extensions of each prompt's beams, best first, and the beam each extends: C and [B, C].

    C is large enough that K of them go on even if every beam's extensions by stop ids are among them.
    """
    batch, beams = state.running.scores.shape
    vocab = logits.shape[-1]
    count = beams * max(2, 1 + state.stop_ids.shape[1])
    own = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)  # [R, V]
    processed = process_logits(own, state.sampling, features).reshape(batch, beams, vocab)
    totals = state.running.scores[:, :, None] + processed
    scores, flat = jax.lax.top_k(totals.reshape(batch, -1), count)  # [B, C]
    parents, tokens = flat // vocab, flat % vocab
    sequences = _gather(state.running, parents)
    candidates = Hypotheses(
        tokens=sequences.tokens.at[:, :, state.length].set(tokens),
        logprobs=sequences.logprobs.at[:, :, state.length].set(_gather(own.reshape(batch, -1), flat)),
        scores=scores,
    )
    return candidates, parents


def _normalized(totals: jax.Array, length: jax.Array, length_penalty: jax.Array) -> jax.Array:
    """Sums of log-probabilities as scores of continuations of this length."""
    return totals / length.astype(jnp.float32) ** length_penalty


def _best(hypotheses: Hypotheses, count: int) -> tuple[Hypotheses, jax.Array]:
    """The `count` hypotheses of each prompt with the highest scores, and where they were [B, count]."""
    _, where = jax.lax.top_k(hypotheses.scores, count)
    return _gather(hypotheses, where), where


def _gather(tree: Any, index: jax.Array) -> Any:
    """Entries index[b] of row b of every leaf: [B, N, ...] by [B, J] -> [B, J, ...]."""
    return jax.tree.map(lambda x: jax.vmap(lambda row, i: row[i])(x, index), tree)


def _continue_rows(sampling: SamplingState, parents: jax.Array, tokens: jax.Array) -> SamplingState:
    """The rows' history after beams `parents` were continued by `tokens`, both [B, K]."""
    counts = sampling.counts
    if counts is not None:
        grouped = _gather(counts.reshape(*parents.shape, -1), parents)
        new = grouped + jax.nn.one_hot(tokens, counts.shape[-1], dtype=jnp.int32)
        counts = new.reshape(counts.shape)
    return dataclasses.replace(sampling, step=sampling.step + 1, counts=counts)


def _shard_state(state: BeamState) -> BeamState:
    """Prompts and rows over the data axes."""
    return jax.tree.map(lambda x: shard(x, "batch", *(None,) * (x.ndim - 1)) if x.ndim else x, state)


def beam_search(
    model: Model,
    params: Params,
    mesh: Mesh,
    prompts: Sequence[Sequence[int]],
    sampling: Sequence[SamplingParams],
    options: BeamOptions,
    *,
    stop_ids: Sequence[Sequence[int]],
    compiled: Compiled,
    timing: Timing,
) -> Hypotheses:
    """Search for one batch of prompts (token ids); stop_ids are those that end each prompt's texts.

    Of the requests, the limits on length, the penalties, the bias and what ids are allowed apply; as in
    transformers they act on the log-probabilities. Returns numpy arrays of the real prompts,
    [B, num_return, ...]; the scores of hypotheses that do not exist, because too many tokens are banned,
    are -inf.

    Raises:
        ValueError: a prompt does not fit the model, or a request asks for what a search cannot give.
    """
    check_lengths(model, prompts, [p.max_new_tokens for p in sampling])
    check_searchable(sampling)
    # One beam is greedy search, which ends at its first end id whatever might follow it.
    early_stopping = options.early_stopping if options.num_beams > 1 else True
    per_layer = is_per_layer(next(iter(jax.tree.leaves(params["layers"], is_leaf=is_per_layer))))
    with jax.set_mesh(mesh):
        put = lambda x: put_batch(x, mesh)  # noqa: E731
        whole = lambda x: put_whole(x, mesh)  # noqa: E731
        tokens, lengths = pad_prompts(prompts, data_shards(mesh))
        state, features = _first_state(model, prompts, sampling, stop_ids, len(lengths), options)
        state = jax.tree.map(lambda x: put(x) if x.ndim else whole(x), state)
        penalty = whole(np.float32(options.length_penalty))
        longest = max(len(p) + s.max_new_tokens for p, s in zip(prompts, sampling, strict=True))
        size = _round_up(max(longest, tokens.shape[1]))
        cache = init_cache(model.config, len(lengths), size, mesh, per_layer=per_layer)

        args = (params, cache, put(tokens), put(lengths))
        prefill = compiled.get(make_prefill(model), timing, *args)
        began = time.perf_counter()
        logits, cache = jax.block_until_ready(prefill(*args))
        timing.prefill_s += time.perf_counter() - began
        timing.prefill_tokens += sum(map(len, prompts))

        start = make_start(features, early_stopping)
        start = compiled.get(start, timing, logits, cache, state, penalty)
        began = time.perf_counter()
        state, cache = start(logits, cache, state, penalty)
        timing.decode_s += time.perf_counter() - began
        search = make_search(model, features, early_stopping)
        search = compiled.get(search, timing, params, cache, state, penalty)
        began = time.perf_counter()
        state, cache = search(params, cache, state, penalty)
        found = fetch(state.finished)
        timing.decode_s += time.perf_counter() - began
    found = jax.tree.map(lambda x: x[: len(prompts), : options.num_return], found)
    timing.decode_tokens += int((found.tokens >= 0).sum())
    return found


def _first_state(model, prompts, sampling, stop_ids, padded, options):
    """BeamState of numpy arrays before the first token; prompts beyond the real ones are closed."""
    beams, steps = options.num_beams, _round_up(max(p.max_new_tokens for p in sampling))
    real = np.arange(padded) < len(prompts)
    prompt_of = np.where(real, np.arange(padded), 0)
    rows = np.repeat(prompt_of, beams)
    packed, features = pack(
        [sampling[p] for p in rows],
        [prompts[p] for p in rows],
        vocab_size=model.config.vocab_size,
        sample_index=[0] * len(rows),
        stop_ids=[stop_ids[p] for p in rows],
        default_seed=0,
    )
    stops = np.full((padded, max(map(len, stop_ids))), -1, np.int32)
    for row, prompt in enumerate(prompt_of):
        stops[row, : len(stop_ids[prompt])] = stop_ids[prompt]

    def nothing():
        return Hypotheses(
            tokens=np.full((padded, beams, steps), -1, np.int32),
            logprobs=np.zeros((padded, beams, steps), np.float32),
            scores=np.full((padded, beams), -np.inf, np.float32),
        )

    running = nothing()
    running.scores[:, 0] = 0  # one beam to begin with, or all would make the same first choices
    state = BeamState(
        running=running,
        finished=nothing(),
        open=real,
        length=np.int32(0),
        budget=np.array([sampling[p].max_new_tokens for p in prompt_of], np.int32),
        stop_ids=stops,
        sampling=packed,
    )
    return state, features


def _round_up(size: int) -> int:
    """Sizes are multiples of a step, so that few shapes are compiled."""
    return -(-size // CACHE_STEP) * CACHE_STEP
