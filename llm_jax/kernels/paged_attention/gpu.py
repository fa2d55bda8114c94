"""Attention of new tokens to keys and values in pages, for NVIDIA GPUs, in Pallas Triton.

Letters: T tokens, R rows, N query heads, K key/value heads, G = N / K, H head dim, L layers, P pages
of Z tokens, M pages of a row; I tiles of queries.

* One kernel for single tokens and for chunks. A program has a tile: some tokens of a row, one or more,
  with all G query heads of a key head beside each other, so that a key is read once for them; it goes
  through the row's keys as flash attention does, each tile of keys by way of the table of pages.
* Single tokens leave most of a GPU idle, so their keys are divided between programs, whose results are
  put together by their logarithms afterwards (flash decoding, Dao et al. 2023).
* New tokens are stored before, by XLA, in place: then there is one place where keys are.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from llm_jax.kernels.chips import GpuRule
from llm_jax.kernels.flash_attention.gpu import LOG2_E, head_width
from llm_jax.kernels.flash_attention.tpu import HIDDEN, LOWEST, product
from llm_jax.kernels.paged_attention.reference import token_rows, write_tokens
from llm_jax.kernels.paged_attention.scales import LANES
from llm_jax.kernels.paged_attention.types import CHUNK_ALIGNMENT, Pages, Rows
from llm_jax.kernels.triton import plgpu

LEAST_KEYS = 512  # of a row's, for a program of its own
WAVES = 4  # programs for each multiprocessor, which has three or four at a time


class PagedTile(NamedTuple):
    """What a program computes at a time: `rows` queries (tokens times heads) and `keys`; and how."""

    rows: int
    keys: int
    warps: int
    stages: int
    splits: int = 1


class QueryTiles(NamedTuple):
    """int32 [I] each: the row a tile is of, its first token, how many it has, and where that one is."""

    row: Any
    start: Any
    count: Any
    position: Any


def decode_tile(rule: GpuRule, rows: int, tokens: int, q: jax.Array, kv_heads: int) -> PagedTile:
    """For `rows` single tokens beside up to `tokens` keys.

    32 KiB of keys and values at a time, and registers for three or four programs a multiprocessor: five
    times the bytes that the memory has under way.
    """
    members = max(16, heads_of_tile(q.shape[1] // kv_heads))  # the least that matrix units take
    splits = pl.cdiv(WAVES * rule.multiprocessors, rows * kv_heads)
    splits = max(1, min(splits, tokens // LEAST_KEYS))
    if q.dtype == jnp.float32:
        return PagedTile(members, 16, 4, 2, splits)
    return PagedTile(members, 64 if head_width(q.shape[2]) <= 128 else 32, 4, 3, splits)


def chunk_tile(rule: GpuRule, q: jax.Array, kv_heads: int) -> PagedTile:
    """For chunks: as `flash_attention.gpu.tile_rule`, with fewer keys, for addresses need registers."""
    members, wide = heads_of_tile(q.shape[1] // kv_heads), head_width(q.shape[2]) > 128
    if q.dtype == jnp.float32:
        return PagedTile(max(16, members), 16, 4, 2)
    rows = 64 if wide and rule.capability < 90 else 128
    return PagedTile(max(rows, members), 32 if wide else 64, 8, 2)


def heads_of_tile(groups: int) -> int:
    """Places that the query heads of a key head take, a power of two."""
    return pl.next_power_of_2(groups)


def tiles_of_chunks(rows: Rows, tokens: int, size: int) -> QueryTiles:
    """Tiles of up to `size` tokens of the rows with several new ones, of `tokens` in all."""
    count = rows.starts.shape[0]
    place = jnp.arange(count)
    of_chunk = (place >= rows.decodes) & (place < rows.rows)
    tiles = jnp.where(of_chunk, (rows.counts + size - 1) // size, 0)
    ends = jnp.cumsum(tiles)
    tile = jnp.arange(tokens // size + min(count, tokens // CHUNK_ALIGNMENT), dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(ends, tile, side="right"), count - 1)
    first = (tile - (ends - tiles)[row]) * size
    there = jnp.where(tile < ends[-1], jnp.clip(rows.counts[row] - first, 0, size), 0)
    position = (rows.lengths - rows.counts)[row] + first
    position = jnp.where(there > 0, position, 0)
    return QueryTiles(*(x.astype(jnp.int32) for x in (row, rows.starts[row] + first, there, position)))


def refusal(rule: GpuRule, pages: Pages) -> str:
    """Why the kernel does not take such pages on a GPU; "" = it does."""
    count, dtype = math.prod(pages.tokens.shape), pages.tokens.dtype
    if dtype == jnp.float8_e4m3fn and rule.capability < 89:
        return f"{rule.name} cannot convert {dtype}: take int8 or float8_e5m2 pages"
    if dtype.itemsize == 1 and 1 << 31 < count <= 1 << 32:
        # Triton's offsets are signed numbers of 32 bits up to 4 GiB.
        return f"{count} numbers of 8 bits in pages: take less than 2 GiB or more than 4"
    return ""


def paged(
    rule: GpuRule,
    q: jax.Array,
    new: jax.Array,
    new_scales: jax.Array | None,
    pages: Pages,
    rows: Rows,
    layer: jax.Array,
    window: jax.Array,
    **how,
) -> tuple[jax.Array, Pages]:
    """`api.paged_attention` of new tokens as pages hold them, [T, 2, K H] and scales [T, 2, K].

    how: scale, softcap and interpret, see `attend`.
    """
    count, most = q.shape[0], rows.starts.shape[0]
    kv_heads = pages.tokens.shape[4] // q.shape[2]
    row, position = token_rows(rows, count)
    pages = write_tokens(pages, new, new_scales, rows.table, layer, row, position)
    place = jnp.arange(most, dtype=jnp.int32)
    single = place < rows.decodes
    tiles = QueryTiles(place, place, single.astype(jnp.int32), jnp.where(single, rows.lengths - 1, 0))
    tile = decode_tile(rule, most, rows.table.shape[1] * pages.page_size, q, kv_heads)
    out = attend(q[:most], pages, rows.table, tiles, layer, window, tile=tile, **how)
    if count > most:
        tile = chunk_tile(rule, q, kv_heads)
        tiles = tiles_of_chunks(rows, count, tile.rows // heads_of_tile(q.shape[1] // kv_heads))
        chunks = attend(q, pages, rows.table, tiles, layer, window, tile=tile, **how)
        out = jnp.pad(out, ((0, count - most), (0, 0), (0, 0)))
        out = jnp.where((jnp.arange(count) < rows.decodes)[:, None, None], out, chunks)
    return jnp.where((position >= 0)[:, None, None], out, 0), pages


def contiguous(
    rule: GpuRule,
    q: jax.Array,
    new: jax.Array,
    new_scales: jax.Array | None,
    pages: Pages,
    lengths: jax.Array,
    layer: jax.Array,
    window: jax.Array,
    ring: bool,
    **how,
) -> tuple[jax.Array, Pages]:
    """`api.contiguous_attention`, likewise. A ring holds what its layers' window sees."""
    count, kv_heads = q.shape[0], pages.tokens.shape[4] // q.shape[2]
    place = jnp.arange(count, dtype=jnp.int32)
    table = jnp.arange(pages.tokens.shape[1], dtype=jnp.int32).reshape(count, -1)
    tokens = table.shape[1] * pages.page_size
    last = jnp.minimum(lengths, tokens - 1)
    slot = lengths % tokens if ring else last
    pages = write_tokens(pages, new, new_scales, table, layer, place, slot)
    tiles = QueryTiles(place, place, jnp.ones_like(place), last)
    tile = decode_tile(rule, count, tokens, q, kv_heads)
    window = jnp.int32(tokens) if ring else window
    return attend(q, pages, table, tiles, layer, window, tile=tile, **how), pages


def attend(
    q: jax.Array,
    pages: Pages,
    table: jax.Array,
    tiles: QueryTiles,
    layer: jax.Array,
    window: jax.Array,
    *,
    tile: PagedTile,
    scale: float,
    softcap: float,
    interpret: bool = False,
) -> jax.Array:
    """Attention [T, N, H] in the dtype of q; of tokens that are in no tile it is any numbers.

    q [T, N, H]; table [R, M] int32; layer and window [] int32: a token sees the tokens of its row at
    positions up to its own and less than `window` before it, which pages hold already.
    """
    layers, count, _, page, lanes = pages.tokens.shape
    tokens, heads, dim = q.shape
    kv_heads = lanes // dim
    q = q.reshape(tokens, kv_heads, -1, dim)
    # Halves of keys and values beside each other: a place in a page is a number.
    held = [pages.tokens.reshape(layers, count, 2 * page, kv_heads, dim)]
    held += [] if pages.scales is None else [pages.scales]
    scalars = jnp.stack([layer, window])
    dtype = q.dtype if tile.splits == 1 else jnp.float32
    arrays = (scalars, jnp.stack(tiles), table, q, *held)
    out, log = pl.pallas_call(
        functools.partial(
            _kernel, tile=tile, page=page, factor=scale / (softcap or 1.0), softcap=softcap
        ),
        grid=(tile.splits, kv_heads, tiles.row.shape[0]),
        in_specs=[_whole(x.shape) for x in arrays],
        out_specs=[_whole((tile.splits, *q.shape)), _whole((tile.splits, *q.shape[:3]))],
        out_shape=[
            jax.ShapeDtypeStruct((tile.splits, *q.shape), dtype),
            jax.ShapeDtypeStruct((tile.splits, *q.shape[:3]), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="paged_attention",
    )(*arrays)
    if tile.splits > 1:
        out = (out * jax.nn.softmax(log, axis=0)[..., None]).sum(axis=0)
    return out.reshape(tokens, heads, dim).astype(q.dtype)


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def _kernel(scalars, tiles, table, q_ref, *rest, tile: PagedTile, page, factor, softcap):
    """One tile of queries of one key head, and a share of its keys."""
    *held, out_ref, log_ref = rest
    split, head, n = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    _, kv_heads, groups, dim = q_ref.shape
    layer, window = scalars[0], scalars[1]
    row, start, count, position = (tiles[i, n] for i in range(4))
    members, size = heads_of_tile(groups), tile.keys

    place = jnp.arange(tile.rows)
    token, member = place // members, place % members
    column = jnp.arange(head_width(dim))[None]
    there = (token < count) & (member < groups)
    where = (start + token[:, None], head, member[:, None], column)
    q = plgpu.load(q_ref.at[where], mask=there[:, None] & (column < dim), other=0.0)

    def read(half, pages, slots, here):
        """Keys (0) or values (1), [keys, H], and their scales [keys]."""
        inside = column < dim if here is None else (column < dim) & here[:, None]
        page_of_key = pages[:, None] if pages.ndim else pages
        at = (layer, page_of_key, (half * page + slots)[:, None], head, column)
        found = plgpu.load(held[0].at[at], mask=inside, other=0.0).astype(q.dtype)
        if len(held) == 1:
            return found, None
        at = (layer, pages, *scale_place(half, head, slots, kv_heads, page))
        return found, plgpu.load(held[1].at[at], mask=here, other=None if here is None else 0.0)

    def of_tile(masked, j, carry):
        out, highest, total = carry
        keys = j * size + jnp.arange(size)
        here = keys < end if masked else None
        if page % size == 0:  # one page holds them, which spares addresses
            pages = table[row, lax.div(j * size, page)]
        else:
            at = table.at[row, lax.div(keys, page)]
            pages = plgpu.load(at, mask=here, other=0 if masked else None)
        slots = lax.rem(keys, page)
        k, k_scales = read(0, pages, slots, here)
        v, v_scales = read(1, pages, slots, here)
        scores = product(q, k, 1, 1)
        if k_scales is not None:
            scores *= k_scales[None]
        scores *= factor
        scores = jnp.tanh(scores) * (softcap * LOG2_E) if softcap else scores * LOG2_E
        if masked:
            apart = (position + token)[:, None] - keys[None]
            scores = jnp.where((apart >= 0) & (apart < window), scores, HIDDEN)
        now = jnp.maximum(highest, scores.max(axis=1))
        weights, shrink = jnp.exp2(scores - now[:, None]), jnp.exp2(highest - now)
        total = total * shrink + weights.sum(axis=1)
        if v_scales is not None:
            weights *= v_scales[None]
        return out * shrink[:, None] + product(weights.astype(v.dtype), v, 1, 0), now, total

    end = position + count
    low, high = lax.div(jnp.maximum(position - window + 1, 0), size), lax.div(end + size - 1, size)
    share = lax.div(high - low + tile.splits - 1, tile.splits)
    low = jnp.minimum(low + split * share, high)
    high = jnp.minimum(low + share, high)
    inner = jnp.clip(lax.div(jnp.maximum(end - window, 0) + size - 1, size), low, high)
    inner_end = jnp.clip(lax.div(position + 1, size), inner, high)
    carry = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full((tile.rows,), LOWEST, jnp.float32),
        jnp.zeros((tile.rows,), jnp.float32),
    )
    for first, last, masked in ((low, inner, True), (inner, inner_end, False), (inner_end, high, True)):
        carry = lax.fori_loop(first, last, functools.partial(of_tile, masked), carry)
    out, highest, total = carry
    inverse = jnp.where(total > 0, 1.0 / total, 0.0)
    out = (out * inverse[:, None]).astype(out_ref.dtype)
    plgpu.store(out_ref.at[split, *where], out, mask=there[:, None] & (column < dim))
    log = jnp.where(total > 0, (highest + jnp.log2(total)) / LOG2_E, HIDDEN)
    plgpu.store(log_ref.at[split, start + token, head, member], log, mask=there)


def scale_place(half, head, slot, kv_heads: int, page: int):
    """(row, lane) of a page's scales, as `scales.scale_places` has them; half: 0 = keys, 1 = values."""
    if page >= LANES:
        rows = kv_heads * (page // LANES)
        return half * rows + lax.div(slot, LANES) * kv_heads + head, lax.rem(slot, LANES)
    beside = LANES // page
    rows = pl.cdiv(kv_heads, beside)
    row = half * rows + lax.div(head, beside) + jnp.zeros_like(slot)
    return row, lax.rem(head, beside) * page + slot
