"""Contiguous key/value cache: one row per sequence, each with its own length.

Letters: L layers, B batch, T new tokens, S slots, W window, N query heads, K cached heads, H head dim.

Layers with full attention keep S slots, slot = position. Layers with a sliding window keep a ring of
W slots, slot = position mod W, so a window layer's memory does not grow with the text. Both pools
ride in the carry of the layer scan and are updated in place. `Prefill` is the same cache seen by
a prompt: it attends within the prompt (nothing came before) and stores what decoding will need.

A cache holds the key heads of a model as it is served on the mesh (`sharding.key_heads`): every shard
has the heads its queries read, and nothing is communicated inside attention.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm_jax.config import ModelConfig
from llm_jax.ops.attention import (
    KEY,
    QUERY,
    ROWS,
    attention_mask,
    dot_product_attention,
    note_cached,
    prompt_attention,
    split_attention,
)
from llm_jax.sharding import COMPUTE, key_heads, on_shards, placed, sequence_shards, shard
from llm_jax.tree import PerLayer

POOL = ("layers", "batch", "kv_heads", "slots", "head_dim")

Pool = Any  # (k, v), each [layers, B, K, S, H] or PerLayer of [B, K, S, H]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
    """Keys and values of the tokens so far; attends over them and the new ones."""

    full: Pool  # (k, v) of full-attention layers, slot = position; None if there are none
    ring: Pool  # (k, v) of window layers, slot = position mod W; None if there are none
    length: jax.Array  # [B] int32, tokens stored in each row
    windows: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # of each layer, 0 = full

    def attend(self, layer, q, k, v, *, positions, window, options):
        """See `AttentionContext`. New tokens are real (no padding) and positions consecutive."""
        run = partial(_attend_new, options)
        return self._apply(run, layer, q, k, v, positions, window)

    def attend_prompt(self, layer, q, k, v, lengths, *, positions, window, options):
        """`attend` of `Prefill`."""
        run = partial(_attend_prompt, options)
        return self._apply(run, layer, q, k, v, positions, window, lengths)

    def dropout(self, x, rate, layer, site):
        return x

    def advance(self, n: jax.Array | int) -> "DenseCache":
        """The cache after n more tokens in every row ([B] or a number)."""
        return dataclasses.replace(self, length=self.length + n)

    def take(self, rows: jax.Array) -> "DenseCache":
        """The cache whose row i is row rows[i] of this one; rows [R] int32."""
        pick = lambda x: jnp.take(x, rows, axis=x.ndim - 4)  # noqa: E731
        full, ring = jax.tree.map(pick, (self.full, self.ring))
        return dataclasses.replace(self, full=full, ring=ring, length=self.length[rows])

    def take_within(self, parents: jax.Array) -> "DenseCache":
        """The cache in which row k of group b was the group's row parents[b, k]; parents [B, K].

        `take` gathers over the whole batch; here rows stay on their shard.
        """
        taken = jax.tree.map(lambda x: rows_within(x, max(x.ndim - 4, 0), parents), self)
        return taken.constrained()

    def prefill(self, lengths: jax.Array) -> "Prefill":
        """This cache, empty, as the context of prompts of `lengths` [B] tokens."""
        return Prefill(self, lengths)

    def constrained(self) -> "DenseCache":
        """With its sharding pinned, so that steps return what they were given."""
        return jax.tree.map(lambda x: shard(x, *_axes(x)), self)

    def _apply(self, run, layer, q, k, v, *rest):
        """`run` on the pool and slot of this layer; returns the output and the changed cache."""
        check_heads(k, self._heads)
        slots = layer_slots(self.windows)

        def on(name):
            out, pool = _on_pool(partial(run, ring=name == "ring"), getattr(self, name), slots, layer)(
                q, k, v, self.length, *rest
            )
            return out, dataclasses.replace(self, **{name: pool})

        if self.ring is None or self.full is None:
            return on("full" if self.ring is None else "ring")
        if isinstance(layer, int):
            return on("ring" if self.windows[layer] else "full")
        is_ring = jnp.asarray(self.windows)[layer] > 0
        return jax.lax.cond(is_ring, lambda: on("ring"), lambda: on("full"))

    @property
    def _heads(self) -> int:
        return jax.tree.leaves((self.full, self.ring))[0].shape[-3]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefill:
    """An empty `DenseCache` or `TiledCache` taking in right-padded prompts of `lengths` tokens."""

    cache: Any
    lengths: jax.Array  # [B] int32

    def attend(self, layer, q, k, v, **how):
        """See `AttentionContext`."""
        out, cache = self.cache.attend_prompt(layer, q, k, v, self.lengths, **how)
        if sequence_shards(q.shape[1]) > 1:  # the other is then not computed; padding comes last
            segments = jnp.ones(q.shape[:2], jnp.int32)
            positions, window, options = (how[name] for name in ("positions", "window", "options"))
            out = split_attention(q, k, v, positions, segments, window, options)
        return out, dataclasses.replace(self, cache=cache)

    def dropout(self, x, rate, layer, site):
        return x

    def done(self) -> Any:
        """The cache with the prompts in it."""
        return dataclasses.replace(self.cache, length=self.lengths)


def layer_slots(windows: tuple[int, ...]) -> tuple[int, ...]:
    """Index of each layer within its pool."""
    return tuple(sum(bool(w) == bool(windows[i]) for w in windows[:i]) for i in range(len(windows)))


def ring_windows(config: ModelConfig, size: int) -> tuple[tuple[int, ...], int]:
    """(the window of each layer that a ring holds, 0 = all its tokens are kept; that window's size).

    Raises ValueError when windowed layers differ in their window.
    """
    sizes = {w for w in config.layer_windows if w}
    if len(sizes) > 1:
        raise ValueError(f"windows={config.windows}: window layers must share one size in a cache")
    window = min(sizes, default=0)
    ringed = 0 < window < size  # a window that holds everything needs no ring
    return tuple(w if ringed else 0 for w in config.layer_windows), window


def abstract_dense(
    config: ModelConfig, batch: int, size: int, mesh: Mesh, *, per_layer: bool = False
) -> DenseCache:
    """Shapes, dtypes and shardings of an empty cache; see `choice.init_cache`."""
    windows, window = ring_windows(config, size)
    num_ring = sum(w > 0 for w in windows)
    heads = key_heads(config.num_heads, config.num_kv_heads, mesh)
    dtype = jnp.dtype(config.cache_dtype)

    def pool(layers, slots):
        if not layers:
            return None
        shape = (batch, heads, slots, config.head_dim)
        if per_layer:
            one = PerLayer(tuple(jax.ShapeDtypeStruct(shape, dtype) for _ in range(layers)))
        else:
            one = jax.ShapeDtypeStruct((layers, *shape), dtype)
        return (one, one)

    abstract = DenseCache(
        full=pool(len(windows) - num_ring, size),
        ring=pool(num_ring, window),
        length=jax.ShapeDtypeStruct((batch,), jnp.int32),
        windows=windows,
    )
    return placed(abstract, jax.tree.map(_axes, abstract), mesh, COMPUTE)


def rows_within(x: jax.Array, axis: int, parents: jax.Array) -> jax.Array:
    """x whose row k of group b, along `axis`, was the group's row parents[b, k]; parents [B, K]."""
    grouped = x.reshape(*x.shape[:axis], parents.shape[0], -1, *x.shape[axis + 1 :])
    pick = partial(jnp.take, axis=axis, mode="clip")
    taken = jax.vmap(pick, in_axes=(axis, 0), out_axes=axis)(grouped, parents)
    return taken.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def _axes(x: Any) -> tuple[str, ...]:
    """Logical axes of a leaf: a length [B], or a pool with or without its layer axis."""
    return ("batch",) if x.ndim == 1 else POOL[-x.ndim :]


def _on_pool(run, pool, slots, layer):
    """`run(k_pool, v_pool, slot, ...)` on the shards of one layer's pool; returns (out, pool)."""
    k_pool, v_pool = pool
    per_layer = isinstance(k_pool, PerLayer)
    slot = slots[layer] if per_layer else jnp.asarray(slots, jnp.int32)[layer]
    args = (k_pool[slot], v_pool[slot]) if per_layer else (k_pool, v_pool)
    axes = POOL[-args[0].ndim :]

    def call(q, k, v, length, positions, window, *lengths):
        index = jnp.asarray(0 if per_layer else slot, jnp.int32)
        in_axes = [axes, axes, (), QUERY, KEY, KEY, ("batch",), ROWS, *([("batch",)] * len(lengths))]
        given = (*args, index, q, k, v, length, positions, *lengths)
        options = {"stacked": not per_layer}
        if isinstance(window, int):  # known to kernels
            local = partial(run, window=window, **options)
        else:
            local = lambda *x: run(*x[:-1], window=x[-1], **options)  # noqa: E731
            in_axes, given = [*in_axes, ()], (*given, window)
        out, new_k, new_v = on_shards(local, in_axes, out_like=(3, 0, 1))(*given)
        if per_layer:
            new_k, new_v = (
                PerLayer(p.parts[:slot] + (x,) + p.parts[slot + 1 :])
                for p, x in ((k_pool, new_k), (v_pool, new_v))
            )
        return out, (new_k, new_v)

    return call


def _attend_new(options, k_pool, v_pool, slot, q, k, v, length, positions, *, window, ring, stacked):
    """Attend over stored and new tokens, and store the new ones."""
    assert options.causal, "a cache serves causal models"
    attend = partial(dot_product_attention, scale=options.scale, softcap=options.softcap)
    kv_heads, capacity = k_pool.shape[-3:-1]
    note_cached(q, kv_heads, capacity, "xla", "heads-major arrays, one product; see cache/choice.py")
    old_k, old_v = (_layer(p, slot, stacked) for p in (k_pool, v_pool))
    last = positions[:, -1:]
    if not ring:
        index = positions
    else:  # only the last W new tokens survive; the others fall outside and are dropped
        index = jnp.where(positions > last - capacity, positions % capacity, capacity)
    k_pool, v_pool = (_write(p, slot, x, index, stacked) for p, x in ((k_pool, k), (v_pool, v)))
    if ring and q.shape[1] > 1:  # new tokens push out keys that their elders still see
        held = ring_positions(length[:, None] - 1, capacity)
        keys = jnp.concatenate([old_k, k.astype(old_k.dtype).transpose(0, 2, 1, 3)], axis=2)
        values = jnp.concatenate([old_v, v.astype(old_v.dtype).transpose(0, 2, 1, 3)], axis=2)
        key_positions = jnp.concatenate([held, positions], axis=1)
    else:
        keys, values = (_layer(p, slot, stacked) for p in (k_pool, v_pool))
        everywhere = jnp.broadcast_to(jnp.arange(capacity)[None], (q.shape[0], capacity))
        key_positions = ring_positions(last, capacity) if ring else everywhere
    mask = attention_mask(positions, key_positions, window=window, causal=True)
    return attend(q, keys.astype(q.dtype), values.astype(q.dtype), mask), k_pool, v_pool


def _attend_prompt(
    options, k_pool, v_pool, slot, q, k, v, length, positions, lengths, *, window, ring, stacked
):
    """Attend within the prompt and store it: all of it, or what the ring holds of it."""
    out = prompt_attention(q, k, v, positions, lengths, window, options)
    keys, values = (x.transpose(0, 2, 1, 3) for x in (k, v))
    if ring:
        held = jnp.maximum(ring_positions(lengths[:, None] - 1, k_pool.shape[-2]), 0)
        keys, values = (
            jnp.take_along_axis(x, held[:, None, :, None], axis=2, mode="clip") for x in (keys, values)
        )
    k_pool, v_pool = (_store(p, slot, x, stacked) for p, x in ((k_pool, keys), (v_pool, values)))
    return out, k_pool, v_pool


def ring_positions(last: jax.Array, window: int) -> jax.Array:
    """Position in each slot of a ring whose newest token is at `last` [B, 1] -> [B, W]; -1 = empty."""
    slots = jnp.arange(window)[None]
    return jnp.maximum(last - (last - slots) % window, -1)


def _layer(pool: jax.Array, slot: jax.Array, stacked: bool) -> jax.Array:
    """Keys or values [B, K, S, H] of one layer."""
    return jax.lax.dynamic_index_in_dim(pool, slot, keepdims=False) if stacked else pool


def _write(pool, slot, new, index, stacked):
    """Store new [B, T, K, H] at slots index [B, T] of each row; indices past the end are dropped."""
    if new.shape[:2] == (1, 1):  # written twice: XLA:CPU copies the pool for a scatter of one index
        new, index = jnp.repeat(new, 2, axis=1), jnp.repeat(index, 2, axis=1)
    rows = jnp.arange(new.shape[0])[:, None]
    where = (slot, rows, slice(None), index) if stacked else (rows, slice(None), index)
    return pool.at[where].set(new.astype(pool.dtype), mode="drop")


def _store(pool, slot, new, stacked):
    """Store new [B, K, T, H] in the first T slots of every row."""
    new, where = new.astype(pool.dtype), (0, 0, 0, 0)
    if stacked:
        return jax.lax.dynamic_update_slice(pool, new[None], (slot, *where))
    return jax.lax.dynamic_update_slice(pool, new, where)


def check_heads(k: jax.Array, held: int) -> None:
    """ValueError where keys [B, T, K, H] have other heads than the cache that is to take them in."""
    if k.shape[2] != held:
        raise ValueError(
            f"params give keys of {k.shape[2]} heads, a cache on this mesh has {held}: take those of "
            "`served(model, mesh)`, which `repeat_key_heads` makes (llm_jax.models.key_heads)"
        )
