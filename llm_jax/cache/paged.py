"""The cache of an engine: pages of a pool, which sequences of any length share.

Letters: L layers, D data shards, P pages of Z tokens, T tokens of a step, R rows, M pages of a row,
N query heads, K cached heads, H head dim.

A pool is [L, D P, 2, Z, K H] (kernels/paged_attention), with room for more heads where a TPU wants it
(`types.heads_held`). Each data shard has pages of its own, numbered from 0 there, and rows of its own.
Layers with a window have a pool of their own, so that a sequence holds no more of them than its window.
Which page is whose is decided on the host (engine/pages.py); a step brings its `StepRows`, and
`PagedContext` is the cache as those rows see it.
"""

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm_jax.cache.dense import check_heads, layer_slots
from llm_jax.config import ModelConfig
from llm_jax.kernels.chips import kind_of
from llm_jax.kernels.paged_attention.api import paged_attention
from llm_jax.kernels.paged_attention.reference import read_page, token_rows
from llm_jax.kernels.paged_attention.types import Pages, Rows, abstract_pages, heads_held
from llm_jax.ops.attention import KEY, QUERY, attention_mask, attention_weights
from llm_jax.sharding import COMPUTE, data_shards, key_heads, on_shards, placed, shard, zeros
from llm_jax.tree import num_bytes

TOKENS = ("layers", "batch", None, None, "kv_heads")  # of a pool
SCALES = ("layers", "batch", "kv_heads", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepRows:
    """The rows of a step on each data shard, int32; see `Rows`."""

    tables: tuple[jax.Array, ...]  # [D, R, M] for each pool, that of full attention first
    starts: jax.Array  # [D, R]
    counts: jax.Array  # [D, R]
    lengths: jax.Array  # [D, R]
    decodes: jax.Array  # [D]
    rows: jax.Array  # [D]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Keys and values of all sequences."""

    pools: tuple[Pages, ...]  # of layers with full attention, of layers with a window; those there are
    windows: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # of each layer, 0 = full
    kv_heads: int = dataclasses.field(metadata={"static": True})  # K, on all shards of "tensor"

    @property
    def page_size(self) -> int:
        """Z, tokens of a page."""
        return self.pools[0].page_size

    def context(self, rows: StepRows) -> "PagedContext":
        """This cache as the context of a step's tokens."""
        return PagedContext(self, rows)

    def constrained(self) -> "PagedCache":
        """With its sharding pinned, so that steps return what they were given."""
        return jax.tree.map(lambda x: shard(x, *_axes(x)), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedContext:
    """A `PagedCache` taking in the tokens of a step: q [D, T, N, H], one batch row per data shard."""

    cache: PagedCache
    rows: StepRows

    def attend(self, layer, q, k, v, *, positions, window, options):
        """See `AttentionContext`. Where a token is stands in the rows; `positions` are the same."""
        assert options.causal, "a cache serves causal models"
        cache = self.cache
        check_heads(k, cache.kv_heads)
        run = functools.partial(_attend, options)

        def on(pool):
            out, new = self._run(run, pool, layer, window, (q, k, v), (QUERY, KEY, KEY))
            pools = tuple(new if i == pool else x for i, x in enumerate(cache.pools))
            return out, dataclasses.replace(self, cache=dataclasses.replace(cache, pools=pools))

        return self._where(layer, on)

    def attention_maps(self, layer, q, k, keep, *, positions, window, options):
        """See `TapContext`. Keys are read back from the pages; S is the tokens that a row can have."""
        run = functools.partial(_maps, options, q.shape[1], q.shape[2] // self.cache.kv_heads)
        given = (jax.vmap(lambda tokens, at: tokens[at])(q, keep), keep)
        axes = (QUERY, ("batch", None))
        return self._where(layer, lambda pool: self._run(run, pool, layer, window, given, axes)[0])

    def _run(self, run, pool: int, layer, window, given: tuple, axes: tuple):
        """`run` on each shard, with a pool, the layer's place in it, and its rows."""
        windows = self.cache.windows
        alike = len(self.cache.pools) == 1  # then the slot is the layer itself
        slot = jnp.asarray(layer if alike else jnp.asarray(layer_slots(windows))[layer], jnp.int32)
        rows = (self.rows.tables[pool], *_of_rows(self.rows))
        of_rows = [("batch", *[None] * (x.ndim - 1)) for x in rows]
        args = (self.cache.pools[pool], slot, jnp.asarray(window, jnp.int32), *given, *rows)
        return _on_pool(run, [(), (), *axes, *of_rows])(*args)

    def _where(self, layer, on):
        """on(the number of the layer's pool)."""
        cache = self.cache
        if len(cache.pools) == 1:
            return on(0)
        if isinstance(layer, int):
            return on(int(cache.windows[layer] > 0))
        is_local = jnp.asarray(cache.windows)[layer] > 0
        return jax.lax.cond(is_local, lambda: on(1), lambda: on(0))

    def dropout(self, x, rate, layer, site):
        return x


def pool_windows(config: ModelConfig) -> tuple[int, ...]:
    """The window of each pool that a model's layers need, 0 = full attention.

    Raises ValueError where windows differ among themselves.
    """
    windows = sorted(set(config.layer_windows))
    if len(windows) - (0 in windows) > 1:
        raise ValueError(f"windows={config.windows}: expected one size besides 0, for one pool of pages")
    return tuple(windows)


def abstract_paged(
    config: ModelConfig,
    pages: tuple[int, ...],
    page_size: int,
    mesh: Mesh,
    dtype: jax.typing.DTypeLike | None = None,
) -> PagedCache:
    """Shapes, dtypes and shardings of an empty cache, `pages` of each pool on each data shard.

    dtype: of the pages, `config.cache_dtype` if not given; 8-bit ones have scales. Raises ValueError for
    heads that the mesh cannot split, and as `abstract_pages` and `pool_windows` do.
    """
    windows, each = pool_windows(config), config.layer_windows
    assert len(windows) == len(pages), f"{pages} for pools of windows {windows}"
    dtype = jnp.dtype(config.cache_dtype if dtype is None else dtype)
    heads = key_heads(config.num_heads, config.num_kv_heads, mesh)
    tensor = mesh.shape["tensor"]
    if heads % tensor:
        raise ValueError(
            f"tensor={tensor} does not divide num_heads={config.num_heads}: take another mesh"
        )

    held = heads_held(heads // tensor, config.head_dim, kind_of(mesh))

    def pool(layers: int, count: int) -> Pages:
        # What one shard has of them; its heads' scales stand together.
        of_shard = (layers, count * data_shards(mesh), page_size, held)
        part = abstract_pages(*of_shard, config.head_dim, dtype)
        wide = lambda x, axis: jax.ShapeDtypeStruct(  # noqa: E731
            tuple(n * tensor if i == axis else n for i, n in enumerate(x.shape)), x.dtype
        )
        return Pages(wide(part.tokens, 4), None if part.scales is None else wide(part.scales, 2))

    pools = tuple(pool(each.count(window), count) for window, count in zip(windows, pages, strict=True))
    abstract = PagedCache(pools, each, heads)
    return placed(abstract, jax.tree.map(_axes, abstract), mesh, COMPUTE)


def init_paged(
    config: ModelConfig,
    pages: tuple[int, ...],
    page_size: int,
    mesh: Mesh,
    dtype: jax.typing.DTypeLike | None = None,
) -> PagedCache:
    """An empty cache, born on its shards; see `abstract_paged`."""
    return zeros(abstract_paged(config, pages, page_size, mesh, dtype))


def page_bytes(config: ModelConfig, page_size: int, mesh: Mesh, dtype=None) -> tuple[int, ...]:
    """Bytes on one device of one page of each pool."""
    cache = abstract_paged(config, (1,) * len(pool_windows(config)), page_size, mesh, dtype)
    return tuple(num_bytes(pool) // data_shards(mesh) // mesh.shape["tensor"] for pool in cache.pools)


def free_bytes(device: Any) -> int:
    """Bytes of memory that a device has left; of a CPU, what the machine has."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def copy_pages(cache: PagedCache, pool: int, sources: jax.Array, targets: jax.Array) -> PagedCache:
    """Pages `targets` [D, n] of a pool become as `sources` [D, n]; int32, a page of each shard's own."""

    def copy(x, sources, targets):
        return (x.at[:, targets[0]].set(x[:, sources[0]]),)

    return _on_pages(cache, pool, copy, sources, targets)


def take_pages(cache: PagedCache, pool: int, pages: jax.Array) -> Pages:
    """Pages [D, n] of a pool, [L, D n, ...]: what goes to the host."""

    def take(x):
        pick = on_shards(lambda x, pages: (x[:, pages[0]],), [_axes(x), ("batch", None)], (0,))
        return pick(x, pages)[0]

    return jax.tree.map(take, cache.pools[pool])


def put_pages(cache: PagedCache, pool: int, pages: jax.Array, content: Pages) -> PagedCache:
    """What `take_pages` gave, back into pages [D, n] of a pool."""

    def put(x, pages, content):
        return (x.at[:, pages[0]].set(content),)

    return _on_pages(cache, pool, put, pages, content=content)


def _on_pages(cache: PagedCache, pool: int, change, *numbers, content: Pages | None = None):
    """The cache with `change` made to each array of a pool, on each shard."""
    arrays, structure = jax.tree.flatten(cache.pools[pool])
    given = [()] * len(arrays) if content is None else [(x,) for x in jax.tree.leaves(content)]
    changed = []
    for x, more in zip(arrays, given, strict=True):
        of_pages = _axes(x)
        axes = [of_pages, *[("batch", None)] * len(numbers), *[of_pages] * len(more)]
        changed += on_shards(change, axes, (0,))(x, *numbers, *more)
    pools = list(cache.pools)
    pools[pool] = jax.tree.unflatten(structure, changed)
    return dataclasses.replace(cache, pools=tuple(pools)).constrained()


def _axes(x: Any) -> tuple[str | None, ...]:
    """Logical axes of an array of a pool: tokens or scales."""
    return TOKENS if x.ndim == 5 else SCALES


def _of_rows(rows: StepRows) -> tuple[jax.Array, ...]:
    return rows.starts, rows.counts, rows.lengths, rows.decodes, rows.rows


def _on_pool(run, axes):
    """run(pool, *args) -> (out, pool) on shards; `axes` are those of the other arguments."""

    def call(pool: Pages, *args):
        arrays, structure = jax.tree.flatten(pool)
        count = len(arrays)

        def local(*flat):
            out, new = run(jax.tree.unflatten(structure, flat[:count]), *flat[count:])
            return (out, *jax.tree.leaves(new))

        query = count + axes.index(QUERY)
        out, *new = on_shards(local, [*map(_axes, arrays), *axes], (query, *range(count)))(
            *arrays, *args
        )
        return out, jax.tree.unflatten(structure, new)

    return call


def _attend(options, pool, slot, window, q, k, v, table, starts, counts, lengths, decodes, rows):
    """One shard's: q [1, T, N, H], k and v [1, T, K, H] and its rows."""
    here = Rows(table[0], starts[0], counts[0], lengths[0], decodes[0], rows[0])
    out, pool = paged_attention(
        q[0],
        k[0],
        v[0],
        pool,
        here,
        slot,
        scale=options.scale,
        window=window,
        softcap=options.softcap or 0.0,
        implementation=None if options.implementation == "auto" else options.implementation,
    )
    return out[None], pool


def _maps(
    options, count, groups, pool, slot, window, q, keep, table, starts, counts, lengths, decodes, rows
):
    """One shard's: attention weights [1, C, N, S] of q [1, C, N, H], the tokens `keep` of `count`.

    groups: query heads that read one key head.
    """
    here = Rows(table[0], starts[0], counts[0], lengths[0], decodes[0], rows[0])
    row, position = token_rows(here, count)
    heads = pool.tokens.shape[-1] // q.shape[-1]
    read = jax.vmap(lambda page: read_page(pool, slot, page, heads)[0])

    def one(given):
        query, at = given
        keys = read(here.table[row[at]])[:, :, : q.shape[2] // groups]  # [M, Z, K, H]
        keys = keys.reshape(-1, *keys.shape[2:]).swapaxes(0, 1)[None]
        every = jnp.arange(keys.shape[2])[None]
        mask = attention_mask(position[at].reshape(1, 1), every, window=window, causal=True)
        query = query[None, None].astype(jnp.float32)
        return attention_weights(query, keys, mask, scale=options.scale, softcap=options.softcap)[0, 0]

    return jax.lax.map(one, (q[0], keep[0]))[None], pool
