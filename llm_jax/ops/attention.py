"""Attention, the protocol by which a model asks for it, and the context of training and encoders.

Letters: B batch, T new tokens, S keys, N query heads, K key/value heads, H head dim.
A model never knows where keys come from: it calls `context.attend(...)`. `FullContext` attends
within the batch; the caches in llm_jax/cache keep keys between calls. Keys and values are
heads-major [B, K, S, H], because each head's keys then lie together in memory, which the decode
step reads once per token.
"""

import dataclasses
from functools import partial
from typing import Protocol, Self

import jax
import jax.numpy as jnp

from llm_jax.kernels.choice import Choice
from llm_jax.kernels.flash_attention.api import choose, flash_attention
from llm_jax.kernels.forms import BLOCKS, FORMS, note, pick
from llm_jax.kernels.tuning import bucket, table_key
from llm_jax.ops.ring import Parts, ring_attention
from llm_jax.sharding import key_heads, on_shards, sequence_shards, shard

CAUSAL_BLOCK = 128  # fewest queries in a block of `attention_in_blocks`
QUERY = ("batch", "slots", "heads", "head_dim")
KEY = ("batch", "slots", "kv_heads", "head_dim")
ROWS = ("batch", "slots")
MASKED = -1e30  # finite, so that a row with no key at all (padding) stays finite too


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """What attention has in common in all layers of a model."""

    causal: bool
    scale: float
    softcap: float | None = None
    implementation: str = "auto"  # see `ModelConfig.attention`
    windows: tuple[int, ...] = (0,)  # those that a layer may have


class AttentionContext(Protocol):
    """What carries keys and values through the layers; a pytree, returned changed."""

    def attend(
        self,
        layer: jax.Array | int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        positions: jax.Array,
        window: jax.Array | int,
        options: AttentionOptions,
    ) -> tuple[jax.Array, Self]:
        """q [B, T, N, H], k and v [B, T, K, H], positions [B, T] -> [B, T, N, H], context.

        window: keys further back than window - 1 positions are hidden, 0 = none are; an array [] where
        layers are scanned that differ in it.
        """
        ...

    def dropout(self, x: jax.Array, rate: float, layer: jax.Array | int, site: int) -> jax.Array:
        """x with dropout while training, else x; `site` tells apart the places in a layer."""
        ...


def attention_mask(
    positions: jax.Array, key_positions: jax.Array, *, window: jax.Array | int, causal: bool
) -> jax.Array:
    """positions [B, T], key_positions [B, S] (-1 = no key there) -> bool [B, T, S], True = visible."""
    distance = positions[:, :, None] - key_positions[:, None, :]
    visible = jnp.broadcast_to(key_positions[:, None, :] >= 0, distance.shape)
    if causal:
        visible &= distance >= 0
    if isinstance(window, int) and window == 0:
        return visible
    return visible & ((jnp.abs(distance) < window) | (window == 0))


def dot_product_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """softmax(scale q k) v with grouped query heads, weights and their sum in float32.

    q [B, T, N, H], k and v [B, K, S, H], mask bool [B, T, S] -> [B, T, N, H] in the dtype of q.
    Query head n reads key head n // (N / K). softcap c squashes scores to c tanh(s / c) (Gemma 2).
    """
    b, t, n, h = q.shape
    kv = k.shape[1]
    grouped = (q * scale).reshape(b, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(b, kv, n // kv * t, h)  # one product per key head
    scores = jnp.einsum("bkth,bksh->bkts", grouped, k, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = scores.reshape(b, kv, n // kv, t, -1)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    peak = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - peak).reshape(b, kv, n // kv * t, -1)
    # Divided after the product: H numbers a query and not S, in the backward pass too.
    out = jnp.einsum("bkts,bksh->bkth", weights.astype(v.dtype), v).astype(weights.dtype)
    out = (out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
    return out.reshape(b, kv, n // kv, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def attention_weights(
    q: jax.Array, k: jax.Array, mask: jax.Array, *, scale: float, softcap: float | None
) -> jax.Array:
    """The softmax of `dot_product_attention`, [B, T, N, S] float32: for looking at, not for speed.

    q [B, T, N, H], k [B, K, S, H], mask bool [B, T, S]. A query that sees no key has zeros.
    """
    b, t, n, h = q.shape
    grouped = (q * scale).reshape(b, t, k.shape[1], -1, h)
    scores = jnp.einsum("btkgh,bksh->btkgs", grouped, k, preferred_element_type=jnp.float32)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    seen = mask[:, :, None]
    weights = jax.nn.softmax(jnp.where(seen, scores.reshape(b, t, n, -1), MASKED), axis=-1)
    return jnp.where(seen, weights, 0.0)


def attention_in_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    block: int,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """`dot_product_attention` of `block` queries at a time, where S = T.

    causal: no query sees a key of a later index, so a block has the keys up to its own end alone: of 8
    blocks nearly half of the scores are never computed. Smaller scores may stay in a processor's cache.
    """
    t = q.shape[1]
    blocks = []
    for start in range(0, t, block):
        end = min(start + block, t)
        seen = end if causal else t
        rows = mask[:, start:end, :seen]
        part = dot_product_attention(
            q[:, start:end], k[:, :, :seen], v[:, :, :seen], rows, scale=scale, softcap=softcap
        )
        blocks.append(part)
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


@dataclasses.dataclass(frozen=True)
class AttentionProblem:
    """Attention within a batch as tables of forms have it; batch and tokens are powers of two.

    training: measured with its gradient, as training needs it; encoders take the same form.
    """

    operator = "attention"
    dtype: str
    causal: bool
    training: bool
    heads: int
    kv_heads: int
    dim: int
    batch: int
    tokens: int

    @property
    def key(self) -> str:
        words = ("causal" if self.causal else "full", "training" if self.training else "prompt")
        names = ("heads", "kv_heads", "dim", "batch", "tokens")
        return table_key(self.dtype, *words, **{name: getattr(self, name) for name in names})

    @property
    def blocks(self) -> list[str]:
        """The forms of XLA that differ: at most 16 blocks of queries, and all queries at once."""
        least = self.tokens // 16
        return [*(name for name, n in BLOCKS.items() if least <= n < self.tokens), "whole"]


@dataclasses.dataclass(frozen=True)
class CachedProblem:
    """Attention of `new` tokens a row to a contiguous cache, which has one form: what the cache is."""

    operator = "cached_attention"
    dtype: str
    heads: int
    kv_heads: int
    dim: int
    batch: int
    tokens: int
    new: int

    @property
    def key(self) -> str:
        names = ("heads", "kv_heads", "dim", "batch", "tokens", "new")
        return table_key(self.dtype, **{name: getattr(self, name) for name in names})


def note_cached(q: jax.Array, kv_heads: int, tokens: int, form: str, reason: str) -> None:
    """Tell `kernels.forms` how q [B, T, N, H] attends to a cache with room for so many tokens."""
    batch, new, heads, dim = q.shape
    sizes = (heads, kv_heads, dim, bucket(batch), bucket(tokens), new)
    note(CachedProblem(str(q.dtype), *sizes), Choice(form, reason))


def block_rule(tokens: int, causal: bool) -> int:
    """Queries of a block: up to 8 blocks of `CAUSAL_BLOCK` at least, or all that see everything."""
    return min(tokens, max(CAUSAL_BLOCK, -(-tokens // 8))) if causal else tokens


def block_of(form: str, tokens: int, causal: bool) -> int:
    """Queries of a block of a form of XLA's; "xla": by the rule."""
    return block_rule(tokens, causal) if form == "xla" else BLOCKS.get(form, tokens)


def attention_form(q: jax.Array, k: jax.Array, options: AttentionOptions, *, training: bool) -> str:
    """How attention within a batch is computed: q [B, T, N, H], k [B, T, K, H] -> "pallas", "whole",
    "block=N", or "xla" for blocks by the rule.

    Raises ValueError where `options` name "pallas" and it cannot be.
    """
    (batch, tokens, heads, dim), kv_heads = q.shape, k.shape[2]
    sizes = (heads, kv_heads, dim, bucket(batch), bucket(tokens))
    problem = AttentionProblem(str(q.dtype), options.causal, training, *sizes)
    named = Choice(options.implementation, "named by ModelConfig.attention")
    if options.implementation == "xla":
        return note(problem, named).implementation
    rule = choose(q, jax.ShapeDtypeStruct((batch, kv_heads, tokens, dim), k.dtype))
    if options.implementation == "auto":
        forms = FORMS["attention"] if rule.possible else FORMS["attention"][1:]
        return pick(problem, rule, forms).implementation
    if not rule.possible:
        raise ValueError(f"attention='pallas': {rule.reason}; take 'auto' or 'xla'")
    return note(problem, named).implementation


def self_attention(q, k, v, window, options: AttentionOptions, **pairs) -> jax.Array:
    """The kernel for q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H]; see `flash_attention`.

    A kernel knows its window when it is compiled: there is one for each that a layer may have.
    """
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    how = {"scale": options.scale, "causal": options.causal, "softcap": options.softcap or 0.0}

    def run(window, q, k, v, pairs):
        return flash_attention(q, k, v, implementation="pallas", window=window, **how, **pairs)[0]

    if isinstance(window, int):
        return run(window, q, k, v, pairs)
    branches = [partial(run, choice) for choice in options.windows]
    which = jnp.argmax(jnp.asarray(options.windows) == window)
    return jax.lax.switch(which, branches, q, k, v, pairs)


def prompt_attention(q, k, v, positions, lengths, window, options: AttentionOptions) -> jax.Array:
    """Causal attention within right-padded prompts of `lengths` [B] tokens: q [B, T, N, H], k and v
    [B, T, K, H] -> [B, T, N, H].
    """
    assert options.causal, "a cache serves causal models"
    form = attention_form(q, k, options, training=False)
    if form == "pallas":
        # Padding comes after all tokens, which do not see it.
        return self_attention(q, k, v, window, options)
    keys, values = (x.transpose(0, 2, 1, 3) for x in (k, v))
    key_positions = jnp.where(positions < lengths[:, None], positions, -1)
    mask = attention_mask(positions, key_positions, window=window, causal=True)
    how = {"scale": options.scale, "softcap": options.softcap, "causal": True}
    return attention_in_blocks(q, keys, values, mask, block=block_of(form, q.shape[1], True), **how)


def split_attention(q, k, v, positions, segment_ids, window, options: AttentionOptions) -> jax.Array:
    """Attention of sequences that are split over the mesh axis "context": q [B, T, N, H], k and v
    [B, T, K, H], positions and segments [B, T] -> [B, T, N, H]. See ops/ring.py.
    """
    part = q.shape[1] // sequence_shards(q.shape[1])
    rule = choose(*(jax.ShapeDtypeStruct(x, q.dtype) for x in _part_shapes(q, k, part)))
    if options.implementation == "pallas" and not rule.possible:
        raise ValueError(f"attention='pallas': {rule.reason}; take 'auto' or 'xla'")
    how = "xla" if options.implementation == "xla" else rule.implementation
    fixed = window if isinstance(window, int) else None
    softcap = options.softcap or 0.0
    parts = Parts(how, options.scale, options.causal, softcap, options.windows, fixed)
    k, v = repeated_for_tensor(q, k, v)
    given = () if fixed is not None else (window,)

    def local(q, k, v, positions, segment_ids, *given):
        return (ring_attention(parts, q, k, v, (positions, segment_ids), *given),)

    query, key, row = (("batch", "seq", *rest[2:]) for rest in (QUERY, KEY, ROWS))
    in_axes = [query, key, key, row, row, *[()] * len(given)]
    (out,) = on_shards(local, in_axes, out_like=(0,))(q, k, v, positions, segment_ids, *given)
    return out


def _part_shapes(q, k, tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a device's queries [B, T, N, H] and keys [B, K, T, H]."""
    (batch, _, heads, dim), kv_heads = q.shape, k.shape[2]
    return (batch, tokens, heads, dim), (batch, kv_heads, tokens, dim)


def repeated_for_tensor(q, k, v) -> tuple[jax.Array, jax.Array]:
    """k and v [B, T, K, H] with heads repeated where the tensor axis splits queries but not keys: then
    each shard has what its queries read. In training alone: see models/key_heads.py.
    """
    times = key_heads(q.shape[2], k.shape[2], jax.sharding.get_abstract_mesh()) // k.shape[2]
    return (k, v) if times == 1 else (jnp.repeat(k, times, axis=2), jnp.repeat(v, times, axis=2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Sums over tokens and layers, by text and expert [B, E] float32: how often each expert was chosen,
    and its probabilities. Padding does not count.
    """

    chosen: jax.Array
    probabilities: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullContext:
    """Training and encoders: every key is in the batch and nothing is kept.

    Tokens see each other when their segment ids are equal; 0 marks padding.
    """

    segment_ids: jax.Array  # [B, T] int32
    dropout_key: jax.Array | None = None  # None = no dropout (evaluation)
    routing: Routing | None = None  # of the layers so far; None = it is not counted (ops/experts.py)

    def attend(self, layer, q, k, v, *, positions, window, options):
        if sequence_shards(q.shape[1]) > 1:
            return split_attention(q, k, v, positions, self.segment_ids, window, options), self
        form = attention_form(q, k, options, training=True)
        if form == "pallas":
            return self._by_kernel(q, k, v, positions, window, options), self
        mask = self._mask(positions, window, options)
        k, v = (shard(x.transpose(0, 2, 1, 3), "batch", "kv_heads", "seq", None) for x in (k, v))
        how = {"scale": options.scale, "softcap": options.softcap, "causal": options.causal}
        block = block_of(form, q.shape[1], options.causal)
        return attention_in_blocks(q, k, v, mask, block=block, **how), self

    def attention_maps(self, layer, q, k, keep, *, positions, window, options):
        """See `TapContext`: keys are the batch's."""
        mask = self._mask(positions, window, options)
        q, mask = (jax.vmap(lambda row, at: row[at])(x, keep) for x in (q, mask))
        k = k.transpose(0, 2, 1, 3)
        return attention_weights(q, k, mask, scale=options.scale, softcap=options.softcap)

    def _mask(self, positions, window, options) -> jax.Array:
        """Which keys each token sees, bool [B, T, T]."""
        mask = attention_mask(positions, positions, window=window, causal=options.causal)
        return mask & (self.segment_ids[:, :, None] == self.segment_ids[:, None, :])

    def _by_kernel(self, q, k, v, positions, window, options):
        """The same by a kernel, each device its own rows and heads."""
        k, v = repeated_for_tensor(q, k, v)
        given = () if isinstance(window, int) else (window,)

        def local(q, k, v, positions, segment_ids, *given):
            pairs = {"positions": (positions, positions), "segments": (segment_ids, segment_ids)}
            return (self_attention(q, k, v, given[0] if given else window, options, **pairs),)

        in_axes = [QUERY, KEY, KEY, ROWS, ROWS, *[()] * len(given)]
        args = (q, k, v, positions, self.segment_ids, *given)
        (out,) = on_shards(local, in_axes, out_like=(0,))(*args)
        return out

    def dropout(self, x, rate, layer, site):
        if self.dropout_key is None or rate == 0.0:
            return x
        key = jax.random.fold_in(jax.random.fold_in(self.dropout_key, site), layer)
        keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
        return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
