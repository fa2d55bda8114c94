"""Attention over sequences that are split between devices: keys go round, queries stay.

Each device of the mesh axis "context" has a part of every sequence. It attends to its own keys, hands
them to its neighbour and takes those of the one before, until it has seen all (ring attention, Liu et
al. 2023, arXiv:2310.01889). Parts are joined by their logarithms of sums of exponentials. The backward
pass goes round once more and keeps nothing but a device's own part: what a part's attention was, it
computes again.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.kernels.flash_attention.api import flash_attention

AXIS = "context"


@dataclasses.dataclass(frozen=True)
class Parts:
    """How parts attend to parts. window: of all layers, None where each call says it."""

    implementation: str  # of `flash_attention`
    scale: float
    causal: bool
    softcap: float
    windows: tuple[int, ...]
    window: int | None


def ring_attention(
    parts: Parts,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ids: tuple[jax.Array, jax.Array],
    window: jax.Array | None = None,
) -> jax.Array:
    """q [B, T, N, H], k and v [B, T, K, H] of a device's tokens -> [B, T, N, H] in the dtype of q.

    Called where the mesh axis "context" is manual (inside a shard_map). ids: positions and segments
    [B, T] int32 of its tokens; a query sees keys of its own segment. window []: where `parts` has none.
    """
    return _ring(parts, q, k, v, ids, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(parts: Parts, q, k, v, ids, window):
    return _forward(parts, q, k, v, ids, window)[0]


def _forward(parts, q, k, v, ids, window):
    def join(held, sums):
        k, v, of_keys = held
        part, log = _attend(parts, q, k, v, ids, of_keys, window)
        return _joined(sums, (part.astype(jnp.float32), log))

    nothing = (jnp.zeros(q.shape, jnp.float32), jnp.full(_log_shape(q), -jnp.inf, jnp.float32))
    _, (out, log) = _round((k, v, ids), join, nothing)
    out = out.astype(q.dtype)
    return out, (q, k, v, ids, window, out, log)


def _backward(parts, saved, out_grad):
    """A part's share of the whole is w = exp(its log - the log of all): its output has the gradient w
    times the whole's, its logarithm w times what its output would change.
    """
    q, k, v, ids, window, out, log = saved
    grad = out_grad.astype(jnp.float32)

    def add(held, sums):
        k, v, of_keys, k_grad, v_grad = held
        attend = lambda q, k, v: _attend(parts, q, k, v, ids, of_keys, window)  # noqa: E731
        (part, part_log), back = jax.vjp(attend, q, k, v)
        share = jnp.where(part_log > -jnp.inf, jnp.exp(part_log - log), 0.0)  # [B, N, T]
        change = (grad * (part.astype(jnp.float32) - out.astype(jnp.float32))).sum(axis=-1)
        of_part = (grad * _by_token(share)[..., None]).astype(part.dtype)
        grads = back((of_part, share * change.transpose(0, 2, 1)))
        dq, dk, dv = (x.astype(jnp.float32) for x in grads)
        return sums + dq, (k, v, of_keys, k_grad + dk, v_grad + dv)

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)  # noqa: E731
    q_grad, (_, _, _, k_grad, v_grad) = _round_with((k, v, ids, zeros(k), zeros(v)), add, zeros(q))
    return q_grad.astype(q.dtype), k_grad.astype(k.dtype), v_grad.astype(v.dtype), None, None


_ring.defvjp(_forward, _backward)


def _round(held: Any, join, first: Any):
    """(what was held, sums) after all parts have passed; join(held, sums) -> sums."""
    sums, held = _round_with(held, lambda held, sums: (join(held, sums), held), first)
    return held, sums


def _round_with(held: Any, visit, first: Any):
    """(sums, held) after `held` was at every device and is back; visit(held, sums) -> (sums, held)."""
    size = jax.lax.axis_size(AXIS)
    to_next = [(i, (i + 1) % size) for i in range(size)]

    def turn(carry, _):
        sums, held = visit(carry[1], carry[0])
        return (sums, jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, to_next), held)), None

    return jax.lax.scan(turn, (first, held), length=size)[0]


def _attend(parts: Parts, q, k, v, of_queries, of_keys, window):
    """(attention [B, T, N, H], logarithms [B, N, T] float32, -inf where nothing is seen)."""
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    pairs = {"positions": (of_queries[0], of_keys[0]), "segments": (of_queries[1], of_keys[1])}
    how = {"scale": parts.scale, "causal": parts.causal, "softcap": parts.softcap}

    def run(window, q, k, v, pairs):
        named = {"implementation": parts.implementation, "window": window}
        return flash_attention(q, k, v, **named, **how, **pairs)

    if parts.window is not None:
        out, log = run(parts.window, q, k, v, pairs)
    else:
        which = jnp.argmax(jnp.asarray(parts.windows) == window)
        branches = [functools.partial(run, choice) for choice in parts.windows]
        out, log = jax.lax.switch(which, branches, q, k, v, pairs)
    log = log.astype(jnp.float32)
    return out, jnp.where(log > NOTHING, log, -jnp.inf)


NOTHING = -1e20  # kernels have a very negative number where a query sees no key


def _joined(a, b):
    """Attention over the keys of two parts: (output, logarithm) each."""
    (out_a, log_a), (out_b, log_b) = a, b
    peak = jnp.maximum(log_a, log_b)
    peak = jnp.where(peak > -jnp.inf, peak, 0.0)
    share_a, share_b = jnp.exp(log_a - peak), jnp.exp(log_b - peak)
    total = share_a + share_b
    safe = jnp.where(total > 0, total, 1.0)
    weights = (_by_token(x / safe)[..., None] for x in (share_a, share_b))
    out = sum(w * x for w, x in zip(weights, (out_a, out_b), strict=True))
    return out, jnp.where(total > 0, peak + jnp.log(safe), -jnp.inf)


def _by_token(x: jax.Array) -> jax.Array:
    """[B, N, T] -> [B, T, N]."""
    return x.transpose(0, 2, 1)


def _log_shape(q: jax.Array) -> tuple[int, int, int]:
    batch, tokens, heads, _ = q.shape
    return batch, heads, tokens
