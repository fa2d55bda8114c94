"""The meaning of paged attention in plain jax.numpy, and what a device without a kernel computes.

Letters: T tokens, R rows, C queries of one row, N query heads, K key/value heads, H head dim, L layers,
P pages of Z tokens, M pages of a row.

Row by row and page by page, with running sums: XLA would gather all pages of all rows first, up to the
longest row's, at a fifth of the speed on a CPU. `together` goes through the pages of all single tokens'
rows at once, which is faster where one row is all there is, or rows are spread over many cores.
"""

import functools

import jax
import jax.numpy as jnp

from llm_jax.kernels.paged_attention.scales import scale_places
from llm_jax.kernels.paged_attention.types import Pages, Rows

HIDDEN = -1e30
TILE = 64  # queries of a chunk at once


def reference_paged_attention(
    q: jax.Array,
    new: jax.Array,
    new_scales: jax.Array | None,
    pages: Pages,
    rows: Rows,
    layer: jax.Array,
    *,
    scale: float,
    window: jax.Array,
    softcap: float,
    together: bool = False,
) -> tuple[jax.Array, Pages]:
    """(attention [T, N, H], pages with the new tokens).

    q [T, N, H]; new [T, 2, K H] as pages hold them, with scales [T, 2, K]; window []: how near a key
    must be. See `api.paged_attention`.
    """
    count, most = q.shape[0], rows.starts.shape[0]
    row, position = token_rows(rows, count)
    pages = write_tokens(pages, new, new_scales, rows.table, layer, row, position)
    attend = functools.partial(
        _attend, pages=pages, layer=layer, scale=scale, window=window, softcap=softcap
    )
    single = jnp.arange(most) < rows.decodes
    ends = jnp.where(single, rows.lengths, 0)
    one = lambda q, table, end: attend(q[None], table, end - 1, end)[0]  # noqa: E731
    singles = (q[:most], rows.table, ends)
    out = jax.vmap(one)(*singles) if together else jax.lax.map(lambda x: one(*x), singles)
    if count == most:
        return out, pages
    tile = min(TILE, count)
    padded = jnp.pad(q, ((0, tile), (0, 0), (0, 0)))
    out = jnp.pad(out, ((0, count + tile - most), (0, 0), (0, 0)))

    def one_tile(row, i, out):
        start, first = rows.starts[row] + i * tile, rows.lengths[row] - rows.counts[row] + i * tile
        queries = jax.lax.dynamic_slice_in_dim(padded, start, tile)
        new = attend(queries, rows.table[row], first, rows.lengths[row])
        # Beyond the row's end is what the next row overwrites, or padding.
        return jax.lax.dynamic_update_slice_in_dim(out, new, start, axis=0)

    def one_row(row, out):
        tiles = (rows.counts[row] + tile - 1) // tile
        return jax.lax.fori_loop(0, tiles, functools.partial(one_tile, row), out)

    out = jax.lax.fori_loop(rows.decodes, rows.rows, one_row, out)[:count]
    return jnp.where((position >= 0)[:, None, None], out, 0), pages


def token_rows(rows: Rows, count: int) -> tuple[jax.Array, jax.Array]:
    """(row, position) of each of `count` tokens, [T] int32; -1 for padding."""
    token = jnp.arange(count, dtype=jnp.int32)[:, None]
    active = jnp.arange(rows.starts.shape[0]) < rows.rows
    starts, ends = rows.starts[None], (rows.starts + rows.counts)[None]
    inside = (token >= starts) & (token < ends) & active[None]
    row = jnp.argmax(inside, axis=1).astype(jnp.int32)
    found = inside.any(axis=1)
    position = (rows.lengths - rows.counts)[row] + token[:, 0] - rows.starts[row]
    return jnp.where(found, row, -1), jnp.where(found, position, -1)


def write_tokens(pages: Pages, new, scales, table, layer, row, position) -> Pages:
    """The pages with T new tokens, each of a row of `table` [R, M]; position -1: none."""
    size = pages.page_size
    at = table[row, jnp.maximum(position, 0) // size]
    at = jnp.where(position >= 0, at, pages.tokens.shape[1])  # dropped
    tokens = pages.tokens.at[layer, at, :, position % size].set(
        new.astype(pages.tokens.dtype), mode="drop"
    )
    if scales is None or pages.scales is None:
        return Pages(tokens, None)
    where = tuple(
        jnp.asarray(x)[..., position % size].transpose(2, 0, 1)
        for x in scale_places(scales.shape[2], size)
    )
    of_pages = pages.scales.at[layer, at[:, None, None], *where].set(scales, mode="drop")
    return Pages(tokens, of_pages)


def _attend(q, table, first, end, *, pages: Pages, layer, scale, window, softcap):
    """[C, N, H] of one row's queries at the positions from `first` on, to its keys before `end`."""
    count, heads, dim = q.shape
    size, kv_heads = pages.page_size, pages.tokens.shape[-1] // dim
    grouped = q.astype(jnp.float32).reshape(count, kv_heads, -1, dim).transpose(1, 0, 2, 3) * scale
    grouped = grouped.reshape(kv_heads, -1, dim)  # [K, C G, H]
    positions = jnp.repeat(first + jnp.arange(count), heads // kv_heads)[:, None]
    exact = jax.lax.Precision.HIGHEST

    def add_page(i, sums):
        largest, total, out = sums
        k, v = read_page(pages, layer, table[i], kv_heads)
        scores = jnp.einsum("kxh,zkh->kxz", grouped, k, precision=exact)
        if softcap:
            scores = softcap * jnp.tanh(scores / softcap)
        keys = i * size + jnp.arange(size)[None]
        seen = (keys <= positions) & (positions - keys < window) & (keys < end)
        scores = jnp.where(seen[None], scores, HIDDEN)
        now = jnp.maximum(largest, scores.max(axis=-1, keepdims=True))
        weights = jnp.where(seen[None], jnp.exp(scores - now), 0.0)
        # What lies in a page beyond the row's tokens is anything, and may be no number.
        v = jnp.where((keys < end).reshape(-1, 1, 1), v, 0.0)
        more = jnp.einsum("kxz,zkh->kxh", weights, v, precision=exact)
        keep = jnp.exp(largest - now)
        return now, total * keep + weights.sum(axis=-1, keepdims=True), out * keep + more

    last = jnp.minimum(first + count, end)
    pages_from, pages_to = jnp.maximum(first - window + 1, 0) // size, (last + size - 1) // size
    none = jnp.zeros((*grouped.shape[:2], 1), jnp.float32)
    sums = (none + HIDDEN, none, jnp.zeros(grouped.shape, jnp.float32))
    _, total, out = jax.lax.fori_loop(pages_from, pages_to, add_page, sums)
    out = (out / jnp.where(total > 0, total, 1.0)).reshape(kv_heads, count, -1, dim)
    return out.transpose(1, 0, 2, 3).reshape(q.shape).astype(q.dtype)


def read_page(pages: Pages, layer, page, kv_heads: int):
    """Keys and values of one page, [Z, K, H] float32 each."""
    shape = pages.tokens.shape[2:]
    found = jax.lax.dynamic_slice(pages.tokens, (layer, page, 0, 0, 0), (1, 1, *shape))
    found = found.astype(jnp.float32).reshape(*shape[:2], kv_heads, -1)
    if pages.scales is not None:
        at = jax.lax.dynamic_slice(
            pages.scales, (layer, page, 0, 0), (1, 1, *pages.scales.shape[2:])
        ).reshape(pages.scales.shape[2:])
        found *= at[scale_places(kv_heads, pages.page_size)].swapaxes(1, 2)[..., None]
    return found[0], found[1]
