"""The contiguous cache where there is a kernel: a row per sequence, laid out as that reads one token.

Letters: L layers, B batch, T prompt tokens, W window, M tiles of Z tokens, N query heads, K cached
heads, H head dim.

What `dense` keeps as [L, B, K, M Z, H] twice is here [L, B, M, 2, Z, K H], with room for more heads
where a TPU wants it (`types.heads_held`). These are pages that lie in order (kernels/paged_attention),
so storing a token and attending to all is one kernel, which reads every byte once, in place: no step
copies the cache. Layers with a window keep a ring, as there.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm_jax.cache.dense import (
    Prefill,
    check_heads,
    layer_slots,
    ring_positions,
    ring_windows,
    rows_within,
)
from llm_jax.config import ModelConfig
from llm_jax.kernels.chips import kind_of
from llm_jax.kernels.paged_attention.api import contiguous_attention
from llm_jax.kernels.paged_attention.types import Pages, heads_held
from llm_jax.ops.attention import KEY, QUERY, ROWS, prompt_attention
from llm_jax.sharding import COMPUTE, key_heads, on_shards, placed, shard

POOL = ("layers", "batch", None, None, None, "kv_heads")
TILES = (128, 64, 32, 16)  # tokens of a tile; a ring has a whole number of them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TiledCache:
    """Keys and values of the tokens so far; attends over them and one new one."""

    full: jax.Array | None  # [L, B, M, 2, Z, K H] of full-attention layers, place = position
    ring: jax.Array | None  # of window layers, place = position mod W
    length: jax.Array  # [B] int32, tokens stored in each row
    windows: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # of each layer, 0 = full
    kv_heads: int = dataclasses.field(metadata={"static": True})  # K; tiles may have room for more

    def attend(self, layer, q, k, v, *, positions, window, options):
        """See `AttentionContext`; one new token a row."""
        assert options.causal, "a cache serves causal models"
        if q.shape[1] != 1:
            raise ValueError(f"{q.shape[1]} new tokens a row: a cache of tiles takes one at a time")
        run = functools.partial(_attend_one, options)
        return self._apply(run, layer, q, k, v, window)

    def attend_prompt(self, layer, q, k, v, lengths, *, positions, window, options):
        """`attend` of `Prefill`."""
        run = functools.partial(_attend_prompt, options)
        return self._apply(run, layer, q, k, v, window, positions, lengths)

    def dropout(self, x, rate, layer, site):
        return x

    def advance(self, n: jax.Array | int) -> "TiledCache":
        """The cache after n more tokens in every row ([B] or a number)."""
        return dataclasses.replace(self, length=self.length + n)

    def take(self, rows: jax.Array) -> "TiledCache":
        """The cache whose row i is row rows[i] of this one; rows [R] int32."""
        return jax.tree.map(lambda x: jnp.take(x, rows, axis=min(x.ndim - 1, 1)), self)

    def take_within(self, parents: jax.Array) -> "TiledCache":
        """The cache in which row k of group b was the group's row parents[b, k]; parents [B, K]."""
        taken = jax.tree.map(lambda x: rows_within(x, min(x.ndim - 1, 1), parents), self)
        return taken.constrained()

    def prefill(self, lengths: jax.Array) -> Prefill:
        """This cache, empty, as the context of prompts of `lengths` [B] tokens."""
        return Prefill(self, lengths)

    def constrained(self) -> "TiledCache":
        """With its sharding pinned, so that steps return what they were given."""
        return jax.tree.map(lambda x: shard(x, *_axes(x)), self)

    def _apply(self, run, layer, q, k, v, window, *rest):
        """`run` on the shards of this layer's pool; returns the output and the changed cache."""
        check_heads(k, self.kv_heads)
        slots = layer_slots(self.windows)  # the layer itself, where all are alike
        alike = self.ring is None or self.full is None
        slot = jnp.asarray(layer if alike else jnp.asarray(slots)[layer], jnp.int32)
        fixed, given = (window, ()) if isinstance(window, int) else (None, (window,))

        def on(name):
            def local(pool, slot, q, k, v, length, *more):
                seen = more[0] if given else fixed
                return run(pool, slot, q, k, v, length, seen, *more[len(given) :], ring=name == "ring")

            axes = [POOL, (), QUERY, KEY, KEY, ("batch",), *[()] * len(given)]
            axes += [ROWS[: x.ndim] for x in rest]
            args = (getattr(self, name), slot, q, k, v, self.length, *given, *rest)
            out, new = on_shards(local, axes, out_like=(2, 0))(*args)
            return out, dataclasses.replace(self, **{name: new})

        if alike:
            return on("full" if self.ring is None else "ring")
        is_ring = jnp.asarray(self.windows)[layer] > 0
        return jax.lax.cond(is_ring, lambda: on("ring"), lambda: on("full"))


def why_not_tiled(config: ModelConfig, size: int) -> str:
    """Why the kernel does not serve the model with a cache of `size` tokens a row; "" = it does."""
    if config.head_dim % 16:
        return f"head_dim={config.head_dim} is no multiple of 16"
    for name in ("compute_dtype", "cache_dtype"):
        if getattr(config, name) == "float16":
            return f"the kernel has bfloat16 and float32, not {name}='float16'"
    if not tile_of(config, size):
        return f"windows={config.windows} are no whole number of {TILES[-1]} tokens"
    return ""


def tile_of(config: ModelConfig, size: int) -> int:
    """Z for a cache of up to `size` tokens a row; 0 where a window is no whole number of tiles."""
    windows, window = ring_windows(config, size)
    return next((z for z in TILES if not any(windows) or window % z == 0), 0)


def abstract_tiled(config: ModelConfig, batch: int, size: int, mesh: Mesh) -> TiledCache:
    """Shapes, dtypes and shardings of an empty cache; see `choice.init_cache`."""
    (windows, window), tile = ring_windows(config, size), tile_of(config, size)
    assert tile, f"windows={config.windows}: no whole number of tiles of {TILES} tokens"
    heads, tensor = key_heads(config.num_heads, config.num_kv_heads, mesh), mesh.shape["tensor"]
    shards = tensor if heads % tensor == 0 else 1
    lanes = shards * heads_held(heads // shards, config.head_dim, kind_of(mesh)) * config.head_dim
    dtype = jnp.dtype(config.cache_dtype)
    rings = sum(w > 0 for w in windows)

    def pool(layers, tokens):
        shape = (layers, batch, -(-tokens // tile), 2, tile, lanes)
        return jax.ShapeDtypeStruct(shape, dtype) if layers else None

    length = jax.ShapeDtypeStruct((batch,), jnp.int32)
    pools = pool(len(windows) - rings, size), pool(rings, window)
    abstract = TiledCache(*pools, length, windows, heads)
    return placed(abstract, jax.tree.map(_axes, abstract), mesh, COMPUTE)


def _axes(x: Any) -> tuple[str | None, ...]:
    """Logical axes of a leaf: a length [B] or a pool."""
    return ("batch",) if x.ndim == 1 else POOL


def _attend_one(options, pool, slot, q, k, v, length, window, *, ring):
    """Store a token of every row and attend to all: q [B, 1, N, H], k and v [B, 1, K, H]."""
    layers, batch, tiles, *tile = pool.shape
    pages = Pages(pool.reshape(layers, batch * tiles, *tile), None)
    q, k, v = (x[:, 0] for x in (q, k, v))
    how = {"scale": options.scale, "softcap": options.softcap or 0.0, "window": window, "ring": ring}
    out, pages = contiguous_attention(q, k, v, pages, slot, length, **how)
    return out[:, None], pages.tokens.reshape(pool.shape)


def _attend_prompt(options, pool, slot, q, k, v, length, window, positions, lengths, *, ring):
    """Attend within the prompt and store it: all of it, or what the ring holds of it."""
    _, batch, tiles, _, tile, lanes = pool.shape
    out = prompt_attention(q, k, v, positions, lengths, window, options)
    if ring:
        held = jnp.maximum(ring_positions(lengths[:, None] - 1, tiles * tile), 0)
        k, v = (jnp.take_along_axis(x, held[:, :, None, None], axis=1, mode="clip") for x in (k, v))
    room = lanes // k.shape[3] - k.shape[2]
    new = jnp.stack([k, v], axis=1)
    new = jnp.pad(new, ((0, 0), (0, 0), (0, 0), (0, room), (0, 0))) if room else new
    new = new.reshape(batch, 2, -1, lanes)
    new = jnp.pad(new, ((0, 0), (0, 0), (0, -new.shape[2] % tile), (0, 0)))
    new = new.reshape(1, batch, 2, -1, tile, lanes).swapaxes(2, 3).astype(pool.dtype)
    return out, jax.lax.dynamic_update_slice(pool, new, (slot, 0, 0, 0, 0, 0))
