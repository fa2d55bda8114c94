"""Attention of chunks of new tokens to their pages, which hold the chunks already, for TPUs.

Letters: T tokens, R rows, N query heads, K key/value heads, G = N / K, H head dim, L layers, P pages of
Z tokens, M pages of a row; tiles of `block_q` queries; blocks of S keys.

A tile of queries of all heads goes through the row's keys, fetched as `tpu_decode` does. What happens
between is `flash_attention`'s: scores transposed, keys on sublanes, and those of the next head made
before the softmax of this one.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm_jax.kernels.flash_attention.tpu import HIDDEN, LOWEST, ONES, product
from llm_jax.kernels.paged_attention.fetch import Fetcher
from llm_jax.kernels.paged_attention.scales import LANES, block_scales
from llm_jax.kernels.paged_attention.types import CHUNK_ALIGNMENT


class ChunkSizes(NamedTuple):
    """block_q: queries of a tile; pages_at_once: pages of a block; buffers: blocks in VMEM."""

    block_q: int
    pages_at_once: int
    buffers: int


class _Refs(NamedTuple):
    """Arrays in HBM, buffers and state in VMEM, semaphores."""

    q: Any  # [T, N H] in HBM
    out: Any  # the same
    tile: Any  # [2, block_q, N H]
    result: Any  # [block_q, N H]
    scaled: Any  # [N, block_q, H]
    sum: Any  # [N, H + ones, block_q], of weights times v, and of weights
    highest: Any  # [N, 1, block_q]
    scores: Any  # [2, S, block_q]
    scales: Any  # [2, K, S] of a block of 8-bit pages
    read: Any
    written: Any


def chunk_attention(
    q: jax.Array,
    out: jax.Array,
    pages: tuple[jax.Array, ...],
    layer: jax.Array,
    table: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    lengths: jax.Array,
    first: jax.Array,
    rows: jax.Array,
    window: jax.Array,
    *,
    heads: int,
    scale: float,
    softcap: float,
    sizes: ChunkSizes,
    cores: int,
    vmem_limit: int,
    interpret: bool = False,
) -> jax.Array:
    """`out` [T, N H] with the attention of rows first <= r < rows in place of what it had.

    q [T, N H], N = `heads`, T a multiple of 16. A row's `counts` queries, one at least, begin at
    `starts`, a multiple of 16; they are the last of its `lengths` tokens, all [R] int32. pages as
    `decode_attention` takes them. window []: a key less than so many places before a query is seen.
    cores: 2 divide the key heads, whose lanes must be a multiple of 256.
    """
    lanes, page = pages[0].shape[4], pages[0].shape[3]
    dim, q_lanes = q.shape[1] // heads, q.shape[1] // cores
    kv_heads = lanes // dim
    size = sizes.pages_at_once * page
    extra = ONES // q.dtype.itemsize
    own = heads // cores
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    block = pltpu.VMEM((sizes.buffers, sizes.pages_at_once, 2, page, lanes // cores), pages[0].dtype)
    kernel = functools.partial(
        _kernel,
        parts=len(pages),
        factor=scale / softcap if softcap else scale * math.log2(math.e),
        softcap=softcap,
        cores=cores,
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(cores,),
            in_specs=[anywhere] * (2 + len(pages)),
            out_specs=anywhere,
            scratch_shapes=[
                block,
                *(
                    pltpu.VMEM((sizes.buffers, sizes.pages_at_once, *x.shape[2:]), x.dtype)
                    for x in pages[1:]
                ),
                pltpu.SemaphoreType.DMA((len(pages), sizes.buffers)),
                pltpu.VMEM((2, sizes.block_q, q_lanes), q.dtype),
                pltpu.VMEM((sizes.block_q, q_lanes), q.dtype),
                pltpu.VMEM((own, sizes.block_q, dim), q.dtype),
                pltpu.VMEM((own, dim + extra, sizes.block_q), jnp.float32),
                pltpu.VMEM((own, 1, sizes.block_q), jnp.float32),
                pltpu.VMEM((2, size, sizes.block_q), jnp.float32),
                pltpu.VMEM((2, kv_heads, size) if len(pages) > 1 else (1, 8, LANES), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        input_output_aliases={6: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_limit, disable_bounds_checks=True
        ),
        interpret=interpret,
        name="paged_chunk",
    )(jnp.stack([layer, first, rows, window]), table, starts, counts, lengths, q, out, *pages)


class _Shape(NamedTuple):
    """Numbers known to the compiler. at_once: key heads of a step, whose lanes fill registers."""

    dim: int
    groups: int  # G
    at_once: int
    softcap: float


def _kernel(scalars, table, starts, counts, lengths, q, _, *rest, parts, factor, softcap, cores):
    pages, out, blocks, done = (
        rest[:parts],
        rest[parts],
        rest[parts + 1 : 2 * parts + 1],
        rest[2 * parts + 1],
    )
    refs = _Refs(q, out, *rest[2 * parts + 2 :])
    core, first, rows, window = pl.program_id(0), scalars[1], scalars[2], scalars[3]
    lanes = blocks[0].shape[4]
    own_lanes = _lanes(core, lanes) if cores > 1 else None
    page_of = lambda row, index: table[row, index]  # noqa: E731
    fetcher = Fetcher(scalars[0], page_of, pages, blocks, done, own_lanes)
    own, block_q, dim = refs.scaled.shape
    at_once = LANES // math.gcd(LANES, dim)
    kv_heads = lanes // dim
    shape = _Shape(dim, own // kv_heads, at_once if kv_heads % at_once == 0 else kv_heads, softcap)
    size, buffers = fetcher.size, blocks[0].shape[0]

    def span(row, tile):
        """(first query's position, the end of keys, blocks from, to) of a tile."""
        place = lengths[row] - counts[row] + tile * block_q
        end = jnp.minimum(lengths[row], place + block_q)
        begin = jnp.maximum(place - window + 1, 0) // size
        return place, end, begin, (end + size - 1) // size

    def there(row, tile, block):
        page = blocks[0].shape[3]
        end = span(row, tile)[1]
        return jnp.minimum((end + page - 1) // page - block * fetcher.at_once, fetcher.at_once)

    def after(row, tile):
        """The tile after this one."""
        more = (tile + 1) * block_q < counts[jnp.minimum(row, rows - 1)]
        return jnp.where(more, row, row + 1), jnp.where(more, tile + 1, 0)

    def fetch(step, row, tile, block):
        inside = jnp.minimum(row, rows - 1)

        @pl.when(row < rows)
        def _():
            fetcher.start(step % buffers, row, block, there(row, tile, block))

        more = block + 1 < span(inside, tile)[3]
        following = after(row, tile)
        begin = span(jnp.minimum(following[0], rows - 1), following[1])[2]
        return (
            step + 1,
            jnp.where(more, row, following[0]),
            jnp.where(more, tile, following[1]),
            jnp.where(more, block + 1, begin),
        )

    def move(act, hbm, vmem, done, row, tile, back=False):
        """`act` on the DMAs of a tile's rows of queries or results, of a part of it 16 rows each."""
        count = jnp.minimum(counts[row] - tile * block_q, block_q)
        start = pl.multiple_of(starts[row] + tile * block_q, CHUNK_ALIGNMENT)

        def part(first, size):
            outer = hbm.at[pl.ds(pl.multiple_of(start + first, CHUNK_ALIGNMENT), size)]
            if cores > 1:
                outer = outer.at[:, _lanes(core, vmem.shape[1])]
            inner = vmem.at[pl.ds(first, size)]
            act(pltpu.make_async_copy(*((inner, outer) if back else (outer, inner)), done))

        if block_q <= hbm.shape[0]:
            pl.when(count == block_q)(lambda: part(0, block_q))

        @pl.when(count < block_q)
        def _():
            parts = (count + CHUNK_ALIGNMENT - 1) // CHUNK_ALIGNMENT
            lax.fori_loop(
                0,
                parts,
                lambda i, _: part(pl.multiple_of(i * CHUNK_ALIGNMENT, CHUNK_ALIGNMENT), CHUNK_ALIGNMENT),
                None,
            )

    def read(act, n, row, tile):
        move(act, refs.q, refs.tile.at[n % 2], refs.read.at[n % 2], row, tile)

    def write(act, row, tile):
        move(act, refs.out, refs.result, refs.written, row, tile, back=True)

    def of_tile(row, tile, carry):
        n, before, step, cursor = carry
        following = after(row, tile)
        pl.when(following[0] < rows)(lambda: read(_start, n + 1, *following))
        read(_wait, n, row, tile)
        _begin(refs, n % 2, shape, factor)
        place, end, begin, last = span(row, tile)

        def of_block(block, carry):
            step, cursor = carry
            cursor = fetch(*cursor)
            fetcher.wait(step % buffers, there(row, tile, block))
            start = block * size
            inner = (start + size - 1 <= place) & (start > place + block_q - 1 - window)
            add = functools.partial(_add, refs, fetcher, step % buffers, shape, core)
            pl.when(inner)(functools.partial(add, None))
            pl.when(jnp.logical_not(inner))(functools.partial(add, (start - place, end - start, window)))
            return step + 1, cursor

        step, cursor = lax.fori_loop(begin, last, of_block, (step, cursor))
        pl.when(n > 0)(lambda: write(_wait, *before))
        _end(refs, shape, counts[row] - tile * block_q)
        write(_start, row, tile)
        return n + 1, (row, tile), step, cursor

    @pl.when(first < rows)
    def _():
        zero = jnp.int32(0)
        read(_start, zero, first, zero)
        cursor = (zero, first, zero, span(first, zero)[2])
        for _ in range(buffers - 1):
            cursor = fetch(*cursor)

        def of_row(row, carry):
            tiles = (counts[row] + block_q - 1) // block_q
            return lax.fori_loop(0, tiles, functools.partial(of_tile, row), carry)

        carry = (zero, (first, zero), zero, cursor)
        _, last, _, _ = lax.fori_loop(first, rows, of_row, carry)
        write(_wait, *last)


def _start(copy):
    copy.start()


def _wait(copy):
    copy.wait()


def _lanes(core, count):
    """A core's part of the lanes."""
    return pl.ds(pl.multiple_of(core * count, LANES), count)


def _begin(refs: _Refs, n, shape: _Shape, factor):
    """Scales a tile's queries and clears the sums."""
    dim, width = shape.dim, shape.groups * shape.at_once * shape.dim

    def some(step, _):
        q = refs.tile[n, :, pl.ds(pl.multiple_of(step * width, LANES), width)].astype(jnp.float32)
        q = (q * factor).astype(refs.scaled.dtype)
        for i in range(shape.groups * shape.at_once):
            refs.scaled[step * shape.groups * shape.at_once + i] = q[:, i * dim : (i + 1) * dim]

    lax.fori_loop(0, refs.tile.shape[2] // width, some, None)
    refs.sum[...] = jnp.zeros_like(refs.sum)
    refs.highest[...] = jnp.full_like(refs.highest, LOWEST)


def _end(refs: _Refs, shape: _Shape, count):
    """Sums divided by the sums of weights, as a tile of results; 0 beyond `count` queries."""
    dim, heads = shape.dim, shape.groups * shape.at_once

    def some(step, _):
        parts = []
        for i in range(heads):
            of_head = refs.sum[step * heads + i]
            total = of_head[dim : dim + 1]
            there = (total > 0) & (lax.broadcasted_iota(jnp.int32, total.shape, 1) < count)
            parts.append(jnp.where(there, of_head[:dim] * (1.0 / total), 0.0).T)
        place = pl.ds(pl.multiple_of(step * heads * dim, LANES), heads * dim)
        refs.result[:, place] = jnp.concatenate(parts, axis=1).astype(refs.result.dtype)

    lax.fori_loop(0, refs.scaled.shape[0] // heads, some, None)


def _add(refs: _Refs, fetcher: Fetcher, buffer, shape: _Shape, core, where):
    """A block of keys for all heads; where: (its first key's place from the first query's, keys that
    there are, window), None where every query sees every key.
    """
    block, size, dim = fetcher.blocks[0], fetcher.size, shape.dim
    width, heads = shape.at_once * dim, shape.groups * shape.at_once
    if len(fetcher.blocks) > 1:
        kv_heads = refs.scales.shape[1]
        for i in range(2):
            refs.scales[i] = block_scales(fetcher.blocks[1].at[buffer], i, kv_heads, block.shape[3])

    def some(step, _):
        place = pl.ds(pl.multiple_of(step * width, LANES), width)
        keys, values = (block[buffer, :, i, :, place].reshape(size, width) for i in range(2))
        dtype = refs.scaled.dtype
        if len(fetcher.blocks) > 1:
            of_heads = pl.ds((core * (block.shape[4] // width) + step) * shape.at_once, shape.at_once)
            keys, values = (
                _dequantized(x, refs.scales[i, of_heads], dim, dtype)
                for i, x in enumerate((keys, values))
            )
        rows = values.T
        if where is not None:  # what was there before may be no number
            key = lax.broadcasted_iota(jnp.int32, rows.shape, 1)
            rows = jnp.where(key < where[1], rows, jnp.zeros_like(rows))

        def score(i):
            of_head = slice(i // shape.groups * dim, (i // shape.groups + 1) * dim)
            scores = product(keys[:, of_head], refs.scaled[step * heads + i], 1, 1)
            if shape.softcap:
                scores = jnp.tanh(scores) * (shape.softcap * math.log2(math.e))
            if where is not None:
                scores = jnp.where(_seen(scores.shape, *where), scores, HIDDEN)
            refs.scores[i % 2] = scores

        score(0)
        for i in range(heads):
            if i + 1 < heads:
                score(i + 1)
            of_head = slice(i // shape.groups * dim, (i // shape.groups + 1) * dim)
            _weigh(refs, step * heads + i, refs.scores[i % 2], rows[of_head])

    lax.fori_loop(0, block.shape[4] // width, some, None)


def _weigh(refs: _Refs, head, scores, rows):
    """Adds keys to a head's sums: scores [S, block_q], values rows [H, S]."""
    before = refs.highest[head]
    highest = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
    weights, shrink = jnp.exp2(scores - highest), jnp.exp2(before - highest)
    extra = refs.sum.shape[1] - rows.shape[0]
    rows = jnp.concatenate([rows, jnp.ones((extra, rows.shape[1]), rows.dtype)], axis=0)
    refs.sum[head] = refs.sum[head] * shrink + product(rows, weights.astype(rows.dtype), 1, 0)
    refs.highest[head] = highest


def _seen(shape, ahead, keys, window):
    """[S, block_q]: whether a key, the first of which is `ahead` of the first query, is seen."""
    key = lax.broadcasted_iota(jnp.int32, shape, 0)
    distance = lax.broadcasted_iota(jnp.int32, shape, 1) - key - ahead
    return (distance >= 0) & (distance < window) & (key < keys)


def _dequantized(x, scales, dim, dtype):
    """x [S, heads H] of 8 bits with scales [heads, S] -> dtype."""
    parts = [
        x[:, n * dim : (n + 1) * dim].astype(jnp.float32) * scales[n][:, None]
        for n in range(scales.shape[0])
    ]
    return jnp.concatenate(parts, axis=1).astype(dtype)
