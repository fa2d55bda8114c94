"""Which tokens of a draft may stay: those that plain decoding would have chosen, bit for bit.

    accepted, sampled, state = speculative_accept(draft_tokens, counts, logits, state, features)

The model reads the newest token of each row and a draft of what follows it, up to K tokens, in one
step; its logits say what it would have chosen at each of the K + 1 places. A draft stays while it is
what `sample` chooses at its place, with the row's own random numbers there; the first other choice
replaces it. So the text does not depend on drafts at all, however they were made.

A drafter that draws does it with the very same random numbers (Gumbel noise, by the row's place in its
stream): then both choose alike with probability (1 - d) / (1 + d) or more, where d is the distance of
their distributions (Daliri, Musco & Suresh, arXiv:2408.07978). Rejection sampling (Leviathan et al.,
arXiv:2211.17192) accepts 1 - d, but its texts change with the drafter, and it needs its probabilities.

Letters: B rows, K longest draft, V vocabulary, W words of the mask. P = K + 1 places.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.ops.sampling import Sampled, SamplingFeatures, SamplingState, sample


def speculative_accept(
    draft_tokens: jax.Array,
    draft_counts: jax.Array,
    target_logits: jax.Array,
    state: SamplingState,
    features: SamplingFeatures,
    *,
    masks: jax.Array | None = None,
    choose: Callable = sample,
) -> tuple[jax.Array, Sampled, SamplingState]:
    """The accepted prefix of each row's draft and one token more.

    Every place is chosen as `sample` would after the draft before it: parameters, penalties that
    count the draft, min_new_tokens and the place in the row's random stream. So a row's result does
    not depend on the others, and a row without a draft gets what `sample` gives.

    Args:
        draft_tokens: [B, K] int32.
        draft_counts: [B] int32, how many of them are drafts; what follows is ignored.
        target_logits: [B, P, V]; place i follows the first i drafts.
        state: of the B rows, before the first place.
        features: static under jit, as for `sample`.
        masks: [B, P, W], the mask of each place; None: state.mask holds at all of them.
        choose: what stands for `sample`, of the B P places.

    Returns:
        accepted [B], how many drafts stay; Sampled with tokens [B, P], accepted + 1 of them and then
        -1, and log probabilities [B, P, ...]; the state after these tokens.
    """
    batch, places = target_logits.shape[:2]
    drafted = jnp.arange(places - 1)[None] < draft_counts[:, None]  # [B, K]
    unrolled = _unroll(draft_tokens, state, features, masks)
    chosen, _ = choose(target_logits.reshape(batch * places, -1), unrolled, features)
    chosen = jax.tree.map(lambda x: x.reshape(batch, places, *x.shape[1:]), chosen)
    matches = (chosen.tokens[:, :-1] == draft_tokens) & drafted
    accepted = jnp.sum(jnp.cumprod(matches.astype(jnp.int32), axis=1), axis=1)
    kept = jnp.arange(places)[None] <= accepted[:, None]
    tokens = jnp.where(kept, chosen.tokens, -1)
    return accepted, dataclasses.replace(chosen, tokens=tokens), _advance(state, tokens, features)


def _unroll(
    drafts: jax.Array, state: SamplingState, features: SamplingFeatures, masks: jax.Array | None
) -> SamplingState:
    """The states of the B * P places, each after the drafts before it."""
    batch, places = drafts.shape[0], drafts.shape[1] + 1
    unrolled = jax.tree.map(lambda x: jnp.repeat(x, places, axis=0), state)
    changes: dict[str, Any] = {"step": (state.step[:, None] + jnp.arange(places)[None]).reshape(-1)}
    if features.penalties:
        assert state.counts is not None, "state lacks penalties"
        vocab = state.counts.shape[1]
        added = jnp.cumsum(jax.nn.one_hot(drafts, vocab, dtype=jnp.int32), axis=1)  # [B, K, V]
        added = jnp.concatenate([jnp.zeros((batch, 1, vocab), jnp.int32), added], axis=1)
        changes["counts"] = (state.counts[:, None] + added).reshape(-1, vocab)
    if masks is not None:
        changes["mask"] = masks.reshape(batch * places, -1)
    return dataclasses.replace(unrolled, **changes)


def _advance(state: SamplingState, tokens: jax.Array, features: SamplingFeatures) -> SamplingState:
    """The state after the tokens [B, P] that are not -1."""
    counts = state.counts
    if features.penalties:
        assert counts is not None, "state lacks penalties"
        counts = counts + jnp.sum(jax.nn.one_hot(tokens, counts.shape[1], dtype=jnp.int32), axis=1)
    return dataclasses.replace(state, step=state.step + jnp.sum(tokens >= 0, axis=1), counts=counts)
