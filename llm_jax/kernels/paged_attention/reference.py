"""The meaning of paged attention in plain jax.numpy, and what other devices than TPUs compute.

Letters: T tokens, R rows, N query heads, K key/value heads, H head dim, L layers, P pages of Z tokens,
M pages of a row, S = M Z.
"""

import jax
import jax.numpy as jnp

from llm_jax.kernels.paged_attention.scales import scale_places
from llm_jax.kernels.paged_attention.types import CHUNK_ALIGNMENT, Pages, Rows

HIDDEN = -1e30


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
) -> tuple[jax.Array, Pages]:
    """(attention [T, N, H], pages with the new tokens).

    q [T, N, H]; new [T, 2, K H] as pages hold them, with scales [T, 2, K]; window []: how near a key
    must be. See `api.paged_attention`.
    """
    count = q.shape[0]
    row, position = token_rows(rows, count)
    pages = _written(pages, new, new_scales, rows, layer, row, position)
    attend = lambda x: _attend(*x, pages, rows, layer, scale, window, softcap)  # noqa: E731
    first = rows.starts.shape[0] if count > rows.starts.shape[0] else count
    out = jax.lax.map(attend, (q[:first, None], row[:first], position[:first, None]))[:, 0]
    if count == first:
        return out, pages
    # A tile of tokens is one row's, except where single tokens come first.
    tiles = (x.reshape(-1, CHUNK_ALIGNMENT, *x.shape[1:]) for x in (q, row, position))
    tiled_q, tiled_row, tiled_position = tiles
    chunks = jax.lax.map(attend, (tiled_q, tiled_row.max(axis=1), tiled_position))
    chunks = chunks.reshape(q.shape)
    single = (jnp.arange(count) < rows.decodes)[:, None, None]
    padded = jnp.pad(out, ((0, count - first), (0, 0), (0, 0)))
    out = jnp.where(single, padded, jnp.where((position >= 0)[:, None, None], chunks, 0))
    return out, pages


def token_rows(rows: Rows, count: int) -> tuple[jax.Array, jax.Array]:
    """(row, position) of each of `count` tokens, [T] int32; -1 for padding."""
    token = jnp.arange(count, dtype=jnp.int32)[:, None]
    active = jnp.arange(rows.starts.shape[0]) < rows.rows
    inside = (token >= rows.starts) & (token < rows.starts + rows.counts) & active
    row = jnp.argmax(inside, axis=1).astype(jnp.int32)
    found = inside.any(axis=1)
    position = (rows.lengths - rows.counts)[row] + token[:, 0] - rows.starts[row]
    return jnp.where(found, row, -1), jnp.where(found, position, -1)


def _written(pages: Pages, new, scales, rows: Rows, layer, row, position) -> Pages:
    size = pages.page_size
    at = rows.table[row, jnp.maximum(position, 0) // size]
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


def _attend(q, row, position, pages: Pages, rows: Rows, layer, scale, window, softcap):
    """[C, N, H] of one row's queries at `position` [C], -1 = none there."""
    at = rows.table[jnp.maximum(row, 0)]
    found = pages.tokens[layer, at].astype(jnp.float32)  # [M, 2, Z, K H]
    heads, dim = q.shape[1:]
    kv_heads = found.shape[-1] // dim
    found = found.reshape(*found.shape[:3], kv_heads, dim)
    if pages.scales is not None:
        where = scale_places(kv_heads, pages.page_size)
        found *= pages.scales[layer, at][:, *where].swapaxes(2, 3)[..., None]
    k, v = found.transpose(1, 3, 0, 2, 4).reshape(2, kv_heads, -1, dim)
    grouped = q.astype(jnp.float32).reshape(-1, kv_heads, heads // kv_heads, dim) * scale
    exact = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("ckgh,ksh->ckgs", grouped, k, precision=exact)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    distance = position[:, None] - jnp.arange(k.shape[1])
    seen = ((distance >= 0) & (distance < window))[:, None, None]
    scores = jnp.where(seen, scores, HIDDEN)
    weights = jnp.where(seen, jnp.exp(scores - scores.max(axis=-1, keepdims=True)), 0.0)
    # What lies in pages beyond a row's tokens is anything, and may be no number.
    v = jnp.where((jnp.arange(k.shape[1]) <= position.max())[None, :, None], v, 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    out = jnp.einsum("ckgs,ksh->ckgh", weights, v, precision=exact)
    return out.reshape(q.shape).astype(q.dtype)
