"""The jitted steps that draft on the device, what `make_paged_verify` then judges.

Letters: D data shards, R rows, K longest draft, P = K + 1, M pages of a row, V vocabulary, E embed.

    slots, cache = draft(params, cache, slots, logits, of)     a small model, after its own forward
    slots = draft(head, params, slots, of)                     a head on the large one's hidden states

A draft is chosen as `sample` would, at its place in the row's own random stream: see ops/speculation.py.
It never reaches the host: it goes to `Slots.newest`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.cache.paged import StepRows
from llm_jax.infer.paged_steps import Slots, pinned, rows_of
from llm_jax.models import Model
from llm_jax.models.draft_head import DraftHeadModel
from llm_jax.ops.sampling import SamplingFeatures, SamplingState, sample

OF_MODEL = 4  # numbers of a row that come before its pages in what `make_model_draft` is told


@functools.lru_cache(maxsize=64)
def make_model_draft(model: Model, pools: int, features: SamplingFeatures) -> Callable:
    """f(params, cache, slots, logits [D, R, V'], of [D, R, 4 + pools M] int32) -> (slots, cache).

    logits: of the small model, after each row's newest token. of: a row's slot, one past the last is
    none; how many tokens its sequence made before; how many to draft; its length with the newest token;
    its pages of each pool. The cache takes in the drafts, all of them: if they stay they are known to
    it. Tokens that only one of the two models has are never drafted. cache, slots: donated.
    """

    @functools.partial(jax.jit, donate_argnames=("cache", "slots"))
    def draft(params, cache, slots, logits, of):
        net, wanted = model.bind(params), of[..., 2]
        lengths, rows = of[..., 3], of.shape[1]
        tables = jnp.split(of[..., OF_MODEL:], pools, axis=-1)
        every = jnp.full(of.shape[:1], rows, jnp.int32)
        starts = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32), of.shape[:2])
        pick = functools.partial(_pick, features, slots.sampling.counts.shape[-1])

        def after(token, place, cache):
            """Hidden states [D, R, E] after the place-th draft; rows that want less do nothing."""
            active = place <= wanted
            pages = tuple(jnp.where(active[..., None], table, 0) for table in tables)  # 0: of nobody
            seen = jnp.where(active, lengths + place, 1)
            known = jnp.minimum(token, model.config.vocab_size - 1)
            context = cache.context(StepRows(pages, starts, jnp.ones_like(seen), seen, every, every))
            hidden, context = net(known, seen - 1, context)
            return hidden, context.cache

        def more(carry):
            return carry[0] <= jnp.max(wanted)

        def one(carry):
            place, token, cache, state, drafts = carry
            hidden, cache = after(token, place, cache)
            last = lambda: (token, state)  # noqa: E731  its keys and values are all that is wanted
            token, state = jax.lax.cond(
                place < jnp.max(wanted), lambda: pick(net.unembed(hidden), state), last
            )
            return place + 1, token, cache, state, drafts.at[..., place].set(token, mode="drop")

        token, state = pick(logits, _states(slots, of))
        drafts = jnp.zeros((*of.shape[:2], slots.newest.shape[-1] - 1), jnp.int32)
        begin = jnp.ones((), jnp.int32), token, cache, state, drafts.at[..., 0].set(token)
        _, _, cache, _, drafts = jax.lax.while_loop(more, one, begin)
        return _written(slots, of, drafts), cache.constrained()

    return draft


@functools.lru_cache(maxsize=64)
def make_head_draft(model: Model, head: DraftHeadModel, features: SamplingFeatures) -> Callable:
    """f(head's params, params, slots, of [D, R, 3] int32) -> slots, from `Slots.hidden`.

    of: a row's slot, one past the last is none; how many tokens its sequence made before; how many to
    draft. slots: donated.
    """

    @functools.partial(jax.jit, donate_argnames="slots")
    def draft(head_params, params, slots, of):
        net, cell, longest = model.bind(params), head.bind(head_params), jnp.max(of[..., 2])
        take = jax.vmap(lambda x, at: jnp.take(x, at, axis=0, mode="clip"))

        def one(carry):
            place, token, hidden, state, drafts = carry
            hidden = cell(hidden, net.embed.lookup(token))
            token, state = _pick(features, model.config.vocab_size, net.unembed(hidden), state)
            return place + 1, token, hidden, state, drafts.at[..., place].set(token)

        token, hidden = take(slots.newest[..., 0], of[..., 0]), take(slots.hidden, of[..., 0])
        drafts = jnp.zeros((*of.shape[:2], slots.newest.shape[-1] - 1), jnp.int32)
        begin = jnp.zeros((), jnp.int32), token, hidden, _states(slots, of), drafts
        drafts = jax.lax.while_loop(lambda carry: carry[0] < longest, one, begin)[-1]
        return _written(slots, of, drafts)

    return draft


def _states(slots: Slots, of: jax.Array) -> SamplingState:
    """How the rows sample [D, R, ...], from the token on that is drafted first."""
    return dataclasses.replace(jax.vmap(rows_of)(slots, of[..., 0]), step=of[..., 1])


def _pick(features: SamplingFeatures, vocab_size: int, logits: jax.Array, state: SamplingState) -> Any:
    """(tokens [D, R], states after them)."""
    spare = vocab_size - logits.shape[-1]
    logits = logits[..., :vocab_size]
    if spare > 0:
        logits = jnp.pad(logits, ((0, 0), (0, 0), (0, spare)), constant_values=-jnp.inf)
    sampled, state = jax.vmap(functools.partial(sample, features=features))(logits, state)
    return sampled.tokens, state


def _written(slots: Slots, of: jax.Array, drafts: jax.Array) -> Slots:
    """With the rows' drafts [D, R, K]."""
    write = jax.vmap(lambda newest, at, new: newest.at[at, 1:].set(new, mode="drop"))
    return pinned(dataclasses.replace(slots, newest=write(slots.newest, of[..., 0], drafts)))
