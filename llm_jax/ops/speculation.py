"""Which tokens of a draft may stay, so that the text is distributed as if there had been no draft.

    accepted, sampled, state = speculative_accept(draft_tokens, counts, None, logits, state, features)

The model reads the newest token of each row and a draft of what follows it, up to K tokens, in one
step; its logits say what it would have chosen at each of the K + 1 places. Exact rejection sampling
(Leviathan et al., arXiv:2211.17192) keeps a prefix of the draft and adds one token of the model's own.

Letters: B rows, K longest draft, V vocabulary, W words of the mask. P = K + 1 places.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.ops.sampling import (
    Sampled,
    SamplingFeatures,
    SamplingState,
    draw_logits,
    gumbel,
    process_logits,
    sample,
    with_logprobs,
)


def speculative_accept(
    draft_tokens: jax.Array,
    draft_counts: jax.Array,
    draft_logprobs: jax.Array | None,
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

    With a deterministic proposer the token that `sample` draws at a place accepts the draft by being
    equal to it, which it is with probability p(x), and replaces it otherwise: the tokens are bit for bit
    those of plain decoding, whatever was drafted. So they are for greedy rows with any proposer. With
    probabilities a draft x is accepted with probability min(1, p(x) / q(x)), p the model's after
    temperature and filters; the replacement is drawn from max(p - q, 0), normalised.

    Args:
        draft_tokens: [B, K] int32.
        draft_counts: [B] int32, how many of them are drafts; what follows is ignored.
        draft_logprobs: [B, K, V], log q that each draft was drawn from, with random numbers other
            than the row's own stream; None for a proposer that does not draw, such as prompt lookup.
        target_logits: [B, P, V]; place i follows the first i drafts.
        state: of the B rows, before the first place.
        features: static under jit, as for `sample`.
        masks: [B, P, W], the mask of each place; None: state.mask holds at all of them.
        choose: what stands for `sample`, of the B P places, where there are no probabilities.

    Returns:
        accepted [B], how many drafts stay; Sampled with tokens [B, P], accepted + 1 of them and then
        -1, and log probabilities [B, P, ...]; the state after these tokens.
    """
    batch, places = target_logits.shape[:2]
    drafted = jnp.arange(places - 1)[None] < draft_counts[:, None]  # [B, K]
    unrolled = _unroll(draft_tokens, state, features, masks)
    flat = target_logits.reshape(batch * places, -1)
    if draft_logprobs is None or not features.sampling:
        chosen, _ = choose(flat, unrolled, features)
        matches = chosen.tokens.reshape(batch, places)[:, :-1] == draft_tokens
    else:
        tokens, matches = _reject(draft_tokens, drafted, draft_logprobs, flat, unrolled, features)
        chosen = with_logprobs(tokens, flat.astype(jnp.float32), features)
    chosen = jax.tree.map(lambda x: x.reshape(batch, places, *x.shape[1:]), chosen)
    accepted = jnp.sum(jnp.cumprod((matches & drafted).astype(jnp.int32), axis=1), axis=1)
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


def _reject(
    drafts: jax.Array,
    drafted: jax.Array,
    draft_logprobs: jax.Array,
    logits: jax.Array,
    state: SamplingState,
    features: SamplingFeatures,
) -> tuple[jax.Array, jax.Array]:
    """Rejection sampling at each place on its own: tokens [B * P], and which drafts stay [B, K]."""
    batch, places = drafts.shape[0], drafts.shape[1] + 1
    processed = process_logits(logits.astype(jnp.float32), state, features)
    scaled = draw_logits(processed, state, features).reshape(batch, places, -1)
    target = jax.nn.log_softmax(scaled, axis=-1)

    def at_drafts(logprobs: jax.Array) -> jax.Array:
        return jnp.take_along_axis(logprobs, drafts[..., None], axis=-1)[..., 0]

    uniform = _uniform(state.key_data, state.step).reshape(batch, places)[:, :-1]
    ratio = at_drafts(target[:, :-1]) - at_drafts(draft_logprobs)  # NaN where both are impossible
    stays = drafted & (jnp.log(uniform) < ratio)

    excess = jnp.maximum(jnp.exp(target[:, :-1]) - jnp.exp(draft_logprobs), 0)
    # Without a draft, or where rounding leaves no excess, the model's own distribution.
    replaces = drafted & jnp.any(excess > 0, axis=-1)
    rest = jnp.where(replaces[..., None], jnp.log(excess), scaled[:, :-1])
    rest = jnp.concatenate([rest, scaled[:, -1:]], axis=1).reshape(batch * places, -1)
    drawn = jnp.argmax(rest + gumbel(state.key_data, state.step, rest.shape[-1]), axis=-1)

    best = jnp.argmax(processed, axis=-1).astype(jnp.int32).reshape(batch, places)
    drawn = drawn.astype(jnp.int32).reshape(batch, places)
    drawn = drawn.at[:, :-1].set(jnp.where(stays, drafts, drawn[:, :-1]))
    greedy = state.temperature.reshape(batch, places) == 0
    tokens = jnp.where(greedy, best, drawn)
    return tokens.reshape(-1), jnp.where(greedy[:, :-1], best[:, :-1] == drafts, stays)


def _uniform(key_data: jax.Array, step: jax.Array) -> jax.Array:
    """[B] in [0, 1): row b's depends on its key and step only, and shares no bits with `gumbel`."""

    def draw(row_key_data: jax.Array, row_step: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(row_key_data, impl="threefry2x32")
        other = row_step.astype(jnp.uint32) | jnp.uint32(1 << 31)  # steps take the lower half
        return jax.random.uniform(jax.random.fold_in(key, other))

    return jax.vmap(draw)(key_data, step)


def _advance(state: SamplingState, tokens: jax.Array, features: SamplingFeatures) -> SamplingState:
    """The state after the tokens [B, P] that are not -1."""
    counts = state.counts
    if features.penalties:
        assert counts is not None, "state lacks penalties"
        counts = counts + jnp.sum(jax.nn.one_hot(tokens, counts.shape[1], dtype=jnp.int32), axis=1)
    return dataclasses.replace(state, step=state.step + jnp.sum(tokens >= 0, axis=1), counts=counts)
