"""The jitted steps of generation: prefill, sample, decode. Pure functions of plain pytrees.

Letters: B rows, T prompt tokens (padded to a bucket), V vocab, E stop ids, M steps per dispatch.

    logits, cache = prefill(params, cache, tokens, lengths)         the whole prompt at once
    logits, cache, scores = scored_prefill(...)                     with its own log probabilities
    ticks, state, cache = start(logits, cache, rows, state)         each row's first token
    ticks, state, cache = decode(params, cache, state, steps)       up to M tokens in one dispatch

`decode` samples on the device and runs several steps for one round trip to the host; it stops early
when every row is done. `forward` and `pick` are the same two halves of a step apart, for beam search
and for a timeline that shows them separately. Caches and states are donated and keep their sharding.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.cache import Cache
from llm_jax.models import Model
from llm_jax.ops.sampling import Sampled, SamplingFeatures, SamplingState, sample, token_logprobs
from llm_jax.sharding import shard

_SCORED = 8  # places that are unembedded at once; divides every prompt bucket and mixed step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What a row carries from token to token, besides its cache."""

    tokens: jax.Array  # [B] int32, the newest token, not yet in the cache
    done: jax.Array  # [B] bool
    budget: jax.Array  # [B] int32, tokens it may still emit
    stop_ids: jax.Array  # [B, E] int32, padded with -1; emitting one ends the row
    sampling: SamplingState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ticks:
    """Up to M steps' choices, one host transfer. Entries of rows that were done are -1."""

    tokens: jax.Array  # [M, B] int32
    logprob: jax.Array | None  # [M, B] float32
    top_ids: jax.Array | None  # [M, B, K] int32
    top_logprobs: jax.Array | None  # [M, B, K] float32
    count: jax.Array  # [] int32, steps that ran
    done: jax.Array  # [B] bool, after them


@functools.lru_cache(maxsize=256)
def make_prefill(model: Model) -> Callable:
    """f(params, cache, tokens [B, T] int32, lengths [B] int32) -> (last token's logits [B, V], cache).

    Prompts are right-padded; the cache must be empty and is donated.
    """

    @functools.partial(jax.jit, donate_argnames="cache")
    def prefill(params, cache, tokens, lengths):
        _, _, logits, cache = _prefill(model, params, cache, tokens, lengths)
        return logits, cache

    return prefill


@functools.lru_cache(maxsize=256)
def make_scored_prefill(model: Model, alternatives: int) -> Callable:
    """As `make_prefill`, but f gives a third result: what `token_logprobs` says of each prompt token.

    Arrays [B, T], [B, T, K] and [B, T, K]; place t is of token t + 1, so the last one is void.
    """

    @functools.partial(jax.jit, donate_argnames="cache")
    def prefill(params, cache, tokens, lengths):
        net, hidden, logits, cache = _prefill(model, params, cache, tokens, lengths)

        unembed = lambda hidden: shard(net.unembed(hidden), "batch", None, None)  # noqa: E731
        return logits, cache, score_tokens(unembed, hidden, jnp.roll(tokens, -1, axis=1), alternatives)

    return prefill


def score_tokens(unembed: Callable, hidden: jax.Array, targets: jax.Array, alternatives: int) -> Any:
    """What `token_logprobs` says of targets [B, T] after hidden [B, T, D]: [B, T] and [B, T, K] twice.

    unembed: [B, 8, D] -> [B, 8, V], so that there are never [B, T, V] logits; T is a multiple of 8.
    """
    score = lambda piece: token_logprobs(unembed(piece[0]), piece[1], alternatives)  # noqa: E731
    split = lambda x: jnp.moveaxis(x.reshape(len(x), -1, _SCORED, *x.shape[2:]), 1, 0)  # noqa: E731
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(*targets.shape, *x.shape[3:])  # noqa: E731
    return jax.tree.map(join, jax.lax.map(score, (split(hidden), split(targets))))


def _prefill(model: Model, params: Any, cache: Cache, tokens: jax.Array, lengths: jax.Array):
    """The bound model, hidden states [B, T, D], the last token's logits [B, V] and the cache."""
    net = model.bind(params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    hidden, context = net(tokens, positions, cache.prefill(lengths))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    logits = shard(net.unembed(last), "batch", None)
    return net, hidden, logits, context.done().constrained()


@functools.lru_cache(maxsize=256)
def make_forward(model: Model) -> Callable:
    """f(params, cache, tokens [B] int32) -> (logits [B, V], cache): one decode step, no sampling."""

    @functools.partial(jax.jit, donate_argnames="cache")
    def forward(params, cache, tokens):
        logits, cache = _forward(model, params, cache, tokens)
        return logits, cache.advance(1).constrained()

    return forward


@functools.lru_cache(maxsize=256)
def make_start(features: SamplingFeatures, expand: bool) -> Callable:
    """f(logits [B, V], cache, rows [R] int32, state) -> (Ticks of one step, state, cache).

    expand: rows of the prompt batch are repeated, row i of the result continues prompt rows[i].
    """

    donated = ("state",) if expand else ("cache", "state")  # repeated rows need another cache

    @functools.partial(jax.jit, donate_argnames=donated)
    def start(logits, cache, rows, state):
        if expand:
            logits, cache = logits[rows], cache.take(rows).constrained()
        ticks, state = _emit(logits, state, features)
        return ticks, _shard_state(state), cache

    return start


@functools.lru_cache(maxsize=256)
def make_pick(features: SamplingFeatures) -> Callable:
    """f(logits [B, V], state) -> (Ticks of one step, state): the sampling half of a decode step."""

    @functools.partial(jax.jit, donate_argnames="state")
    def pick(logits, state):
        ticks, state = _emit(logits, state, features)
        return ticks, _shard_state(state)

    return pick


@functools.lru_cache(maxsize=256)
def make_decode(model: Model, features: SamplingFeatures, max_steps: int) -> Callable:
    """f(params, cache, state, steps [] int32) -> (Ticks, state, cache); steps <= max_steps = M."""

    @functools.partial(jax.jit, donate_argnames=("cache", "state"))
    def decode(params, cache, state, steps):
        def step(carry):
            count, ticks, cache, state = carry
            logits, cache = _forward(model, params, cache, state.tokens)
            cache = cache.advance(jnp.where(state.done, 0, 1)).constrained()
            new, state = _emit(logits, state, features)
            ticks = jax.tree.map(lambda all_, one: all_.at[count].set(one[0]), ticks, _outputs(new))
            return count + 1, ticks, cache, _shard_state(state)

        def unfinished(carry):
            count, _, _, state = carry
            return (count < steps) & ~jnp.all(state.done)

        one = jax.eval_shape(lambda s: _outputs(_emit(_no_logits(model, s), s, features)[0]), state)
        ticks = jax.tree.map(lambda x: jnp.full((max_steps, *x.shape[1:]), -1, x.dtype), one)
        count, ticks, cache, state = jax.lax.while_loop(
            unfinished, step, (jnp.zeros((), jnp.int32), ticks, cache, state)
        )
        return Ticks(*ticks, count=count, done=state.done), state, cache

    return decode


def _forward(model: Model, params: Any, cache: Cache, tokens: jax.Array):
    """Logits [B, V] after one more token in every row; the cache is written, not yet advanced."""
    net = model.bind(params)
    hidden, cache = net(tokens[:, None], cache.length[:, None], cache)
    return shard(net.unembed(hidden[:, 0]), "batch", None), cache


def _emit(logits: jax.Array, state: DecodeState, features: SamplingFeatures):
    """Choose a token in every row; -> (Ticks with M = 1, state)."""
    sampled: Sampled
    sampled, sampling = sample(logits, state.sampling, features)
    tokens = jnp.where(state.done, state.tokens, sampled.tokens)
    budget = state.budget - jnp.where(state.done, 0, 1)
    stopped = jnp.any(tokens[:, None] == state.stop_ids, axis=1)
    done = state.done | stopped | (budget <= 0)
    emitted = jnp.where(state.done, -1, tokens)
    rest = (sampled.logprob, sampled.top_ids, sampled.top_logprobs)
    outputs = jax.tree.map(lambda x: x[None], (emitted, *rest))
    ticks = Ticks(*outputs, count=jnp.ones((), jnp.int32), done=done)
    return ticks, DecodeState(tokens, done, budget, state.stop_ids, sampling)


def _outputs(ticks: Ticks) -> tuple:
    return ticks.tokens, ticks.logprob, ticks.top_ids, ticks.top_logprobs


def _no_logits(model: Model, state: DecodeState) -> jax.Array:
    return jnp.zeros((state.tokens.shape[0], model.config.vocab_size), jnp.float32)


def _shard_state(state: DecodeState) -> DecodeState:
    """Rows over the data axes."""
    return jax.tree.map(lambda x: shard(x, "batch", *(None,) * (x.ndim - 1)), state)
