"""Attention of one new token a row to its pages, for TPUs: bound by the memory, or it is wrong.

Letters: R rows, N query heads, K key/value heads, G = N / K, H head dim, L layers, P pages of Z tokens,
M pages of a row at most, S keys of a block.

* A token's keys of all heads are one row of K H lanes, its values another: a page [2, Z, K H] is one
  piece of memory and one DMA, and nothing in it is padding.
* All heads are one product: queries stand block-diagonally, [N, K H], so that q k^T gives every head its
  own scores and p v has every head's result in its own lanes. It multiplies K times as much, but with so
  few queries the matrix units wait for their weights (keys and values, once each) anyway. Scores are
  then dense, [N, S], and head dims need not fill lanes.
* Blocks of several pages are fetched some blocks ahead, across the ends of rows, so that the memory
  never waits.
* The new token is put into the block in which it belongs before that is attended to, and the tokens
  around it go back to the page: DMAs move whole tiles.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm_jax.kernels.flash_attention.tpu import HIDDEN, LOWEST, product
from llm_jax.kernels.paged_attention.fetch import Fetcher
from llm_jax.kernels.paged_attention.scales import block_scales, token_of_lane


class DecodeSizes(NamedTuple):
    """pages_at_once: pages of a block; buffers: blocks in VMEM."""

    pages_at_once: int
    buffers: int


class InOrder(NamedTuple):
    """Rows whose pages follow each other, row by row: M = `pages` each. ring: of the last M Z tokens."""

    pages: int
    ring: bool


class _Listed(NamedTuple):
    """Where rows have their tokens: as lists in SMEM say."""

    table: Any  # [R, M]
    starts: Any  # [R]
    ends: Any  # [R]
    slots: Any  # [R]

    def page(self, row, index):
        return self.table[row, index]

    def first(self, row):
        return self.starts[row]

    def end(self, row):
        return self.ends[row]

    def slot(self, row):
        return self.slots[row]


class _Computed(NamedTuple):
    """Where rows that are `InOrder` have theirs."""

    order: InOrder
    tokens: int  # M Z
    window: Any  # how near a token must be to be seen
    lengths: Any  # [R] in SMEM, without the new token

    def page(self, row, index):
        return row * self.order.pages + index

    def first(self, row):
        return 0 if self.order.ring else jnp.maximum(self.end(row) - self.window, 0)

    def end(self, row):
        return jnp.minimum(self.lengths[row] + 1, self.tokens)

    def slot(self, row):
        """Inside in any case: a token that no block holds would leave a wait without its DMA."""
        length = self.lengths[row]
        return length % self.tokens if self.order.ring else jnp.minimum(length, self.tokens - 1)


class _Refs(NamedTuple):
    """Of pages and what goes to them there are two where they have scales."""

    places: _Listed | _Computed
    q: Any  # [R, N, H]
    new: tuple[Any, ...]  # [R, 2, K H], [R, X, 128]
    out: Any  # [R, N, H]
    staged: tuple[Any, ...]  # [2, 2, tokens, K H], [2, X, 128], on their way back to pages
    wide: Any  # [N, K H], a row's queries
    sum: Any  # [N, K H], of weights times values
    highest: Any  # [N, 1], the largest score so far
    total: Any  # [N, 1], the sum of weights
    written: Any

    @property
    def kv_heads(self) -> int:
        return self.wide.shape[1] // self.q.shape[2]


def decode_attention(
    q: jax.Array,
    new: tuple[jax.Array, ...],
    pages: tuple[jax.Array, ...],
    layer: jax.Array,
    places: tuple[jax.Array, ...],
    rows: jax.Array | int,
    window: jax.Array | int = 0,
    *,
    order: InOrder | None = None,
    scale: float,
    softcap: float,
    sizes: DecodeSizes,
    cores: int,
    vmem_limit: int,
    interpret: bool = False,
) -> list[jax.Array]:
    """[attention in the shape and dtype of q, *pages with the new tokens, in place].

    q [R, N, H] with query heads in the order (g, k); new ([R, 2, K H],) and pages ([L, P, 2, Z, K H],),
    or with scales of 8-bit pages as a second array, [R, X, 128] (`scales.spread_scales`) and [L, P, X,
    128] float32; layer [] and rows [] int32, how many rows count. places: table [R, M], first, end and
    slot [R] int32: a row attends to its tokens first <= i < end, of which `slot` is the new one; or, of
    rows that are in `order`, their lengths [R] without the new token, and `window`. Rows that do not
    count are left as memory was. cores: those that share the rows.
    """
    _, heads, _ = q.shape
    parts, (_, _, _, page, lanes) = len(pages), pages[0].shape
    group = min(page, 32 // pages[0].dtype.itemsize)
    factor = scale / softcap if softcap else scale * math.log2(math.e)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    column = pltpu.VMEM((heads, 1), jnp.float32)

    def whole(x):
        return pl.BlockSpec(x.shape, lambda i, *_: (0,) * x.ndim)

    return pl.pallas_call(
        functools.partial(
            _kernel, parts=parts, factor=factor, softcap=softcap, cores=cores, order=order
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(places),
            grid=(cores,),
            in_specs=[whole(q), *map(whole, new), *[anywhere] * parts],
            out_specs=[whole(q), *[anywhere] * parts],
            scratch_shapes=[
                *(
                    pltpu.VMEM((sizes.buffers, sizes.pages_at_once, *x.shape[2:]), x.dtype)
                    for x in pages
                ),
                pltpu.VMEM((2, 2, group, lanes), pages[0].dtype),
                *(pltpu.VMEM((2, *x.shape[2:]), x.dtype) for x in pages[1:]),
                pltpu.VMEM((heads, lanes), q.dtype),
                pltpu.VMEM((heads, lanes), jnp.float32),
                column,
                column,
                pltpu.SemaphoreType.DMA((parts, sizes.buffers)),
                pltpu.SemaphoreType.DMA((parts, 2)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, *pages)],
        input_output_aliases={len(places) + 2 + parts + i: 1 + i for i in range(parts)},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_limit, disable_bounds_checks=True
        ),
        interpret=interpret,
        name="paged_decode",
    )(jnp.stack([jnp.asarray(x, jnp.int32) for x in (layer, rows, window)]), *places, q, *new, *pages)


def _kernel(scalars, *rest, parts, factor, softcap, cores, order):
    """All rows, or those of a core."""
    rest = list(rest)

    def take(count=parts):
        taken, rest[:] = tuple(rest[:count]), rest[count:]
        return taken

    listed, (q,), new, _ = take(1 if order else 4), take(1), take(), take()
    (out,), pages, blocks, staged = take(1), take(), take(), take()
    *state, fetched, written = rest
    page = blocks[0].shape[3]
    places = _Computed(order, order.pages * page, scalars[2], *listed) if order else _Listed(*listed)
    refs = _Refs(places, q, new, out, staged, *state, written)
    fetcher = Fetcher(scalars[0], places.page, pages, blocks, fetched)
    core, rows = pl.program_id(0), scalars[1]
    buffers, size = blocks[0].shape[0], fetcher.size

    def span(row):
        """The first block of a row and the one after its last; one at least."""
        row = jnp.maximum(jnp.minimum(row, rows - 1), 0)
        begin = places.first(row) // size
        return begin, jnp.maximum((places.end(row) + size - 1) // size, begin + 1)

    def there(row, block):
        pages = (places.end(row) + page - 1) // page - block * fetcher.at_once
        return jnp.minimum(pages, fetcher.at_once)

    def fetch(step, row, block):
        """Starts fetching what a step needs; returns the step after it."""
        pl.when(row < rows)(lambda: fetcher.start(step % buffers, row, block, there(row, block)))
        more = block + 1 < span(row)[1]
        following = jnp.where(more, row, row + cores)
        return step + 1, following, jnp.where(more, block + 1, span(following)[0])

    def of_row(n, carry):
        row = core + n * cores
        _begin(refs, row, factor)

        def of_block(block, carry):
            step, cursor = carry
            cursor = fetch(*cursor)
            fetcher.wait(step % buffers, there(row, block))
            _attend(refs, fetcher, step % buffers, row, block, n, softcap)
            return step + 1, cursor

        carry = lax.fori_loop(*span(row), of_block, carry)
        _end(refs, row)
        return carry

    count = (rows - core + cores - 1) // cores
    cursor = (jnp.int32(0), core, span(core)[0])
    for _ in range(buffers - 1):
        cursor = fetch(*cursor)
    lax.fori_loop(0, count, of_row, (jnp.int32(0), cursor))
    for back in (2, 1):
        pl.when(count >= back)(functools.partial(_wait_written, refs, fetcher, (count - back) % 2))


def _begin(refs: _Refs, row, factor):
    """Queries stand block-diagonally."""
    q = (refs.q[row].astype(jnp.float32) * factor).astype(refs.wide.dtype)
    wide = jnp.concatenate([q] * refs.kv_heads, axis=1)
    refs.wide[...] = jnp.where(_own(refs), wide, jnp.zeros_like(wide))
    refs.sum[...] = jnp.zeros_like(refs.sum)
    refs.highest[...] = jnp.full_like(refs.highest, LOWEST)
    refs.total[...] = jnp.zeros_like(refs.total)


def _own(refs: _Refs):
    """[N, K H]: where a query head's own key head is."""
    head = lax.broadcasted_iota(jnp.int32, refs.wide.shape, 0) % refs.kv_heads
    return head == lax.broadcasted_iota(jnp.int32, refs.wide.shape, 1) // refs.q.shape[2]


def _end(refs: _Refs, row):
    """A row's result from its sums."""
    own = jnp.where(_own(refs), refs.sum[...], 0.0)
    dim = refs.q.shape[2]
    out = own[:, :dim]
    for k in range(1, refs.kv_heads):
        out += own[:, k * dim : (k + 1) * dim]
    total = refs.total[...]
    refs.out[row] = (out * jnp.where(total > 0, 1.0 / total, 0.0)).astype(refs.out.dtype)


def _attend(refs: _Refs, fetcher: Fetcher, buffer, row, block, n, softcap):
    """Adds a block to a row's sums, with the row's new token if it belongs there."""
    start, slot = block * fetcher.size, refs.places.slot(row)

    @pl.when((slot >= start) & (slot < start + fetcher.size))
    def _():
        _insert(refs, fetcher, buffer, row, slot, n)

    here = refs.places.first(row) - start, refs.places.end(row) - start
    inner = (here[0] <= 0) & (here[1] >= fetcher.size)
    add = functools.partial(_add, refs, fetcher, buffer, softcap)
    pl.when(inner)(functools.partial(add, None))
    pl.when(jnp.logical_not(inner))(functools.partial(add, here))


def _insert(refs: _Refs, fetcher: Fetcher, buffer, row, slot, n):
    """Puts the new token of a core's n-th row into its block, and sends the tokens around it to their
    page.
    """
    block, staged = fetcher.blocks[0], refs.staged[0]
    page, group = block.shape[3], staged.shape[2]
    inside, within = slot // page % fetcher.at_once, slot % page
    place = pl.multiple_of(within // group * group, group)
    pl.when(n >= 2)(lambda: _wait_written(refs, fetcher, n % 2))
    for i in range(2):
        new = refs.new[0][row, pl.ds(i, 1)].astype(jnp.float32)
        old = block[buffer, inside, i, pl.ds(place, group)].astype(jnp.float32)
        at = lax.broadcasted_iota(jnp.int32, old.shape, 0) == within - place
        both = jnp.where(at, new, old).astype(block.dtype)
        block[buffer, inside, i, pl.ds(place, group)] = both
        staged[n % 2, i] = both
    for new, block, staged in zip(refs.new[1:], fetcher.blocks[1:], refs.staged[1:], strict=True):
        old = block[buffer, inside]
        both = jnp.where(token_of_lane(old.shape, page, refs.kv_heads) == within, new[row], old)
        block[buffer, inside] = both
        staged[n % 2] = both
    for copy in _writes(refs, fetcher, n % 2, fetcher.page_of(row, slot // page), place):
        copy.start()


def _writes(refs: _Refs, fetcher: Fetcher, n, page, place):
    """The DMAs of staged tokens, and of their page's scales, to their page."""
    group = refs.staged[0].shape[2]
    for part, (source, target) in enumerate(zip(refs.staged, fetcher.pages, strict=True)):
        target = target.at[fetcher.layer, page]
        target = target if part else target.at[:, pl.ds(place, group)]
        yield pltpu.make_async_copy(source.at[n], target, refs.written.at[part, n])


def _wait_written(refs: _Refs, fetcher: Fetcher, n):
    for copy in _writes(refs, fetcher, n, 0, 0):
        copy.wait()


def _add(refs: _Refs, fetcher: Fetcher, buffer, softcap, here):
    """Adds the keys of a block to a row's sums; here: those that are seen, None = all."""
    block, dtype = fetcher.blocks[0], refs.wide.dtype
    page, lanes = block.shape[3:]
    keys, values = (block[buffer, :, i].reshape(fetcher.size, lanes).astype(dtype) for i in range(2))
    scores = product(refs.wide[...], keys, 1, 1)
    scales = []
    for of_pages in fetcher.blocks[1:]:  # for query heads in the order (g, k)
        groups = refs.wide.shape[0] // refs.kv_heads
        rows = (block_scales(of_pages.at[buffer], i, refs.kv_heads, page) for i in range(2))
        scales = [jnp.concatenate([x] * groups, axis=0) for x in rows]
        scores *= scales[0]
    if softcap:
        scores = jnp.tanh(scores) * (softcap * math.log2(math.e))
    if here is not None:  # what is not seen may be no number
        scores = jnp.where(_inside(scores.shape, 1, here), scores, HIDDEN)
        values = jnp.where(_inside(values.shape, 0, here), values, jnp.zeros_like(values))
    before = refs.highest[...]
    highest = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
    weights, shrink = jnp.exp2(scores - highest), jnp.exp2(before - highest)
    refs.total[...] = refs.total[...] * shrink + weights.sum(axis=1, keepdims=True)
    refs.highest[...] = highest
    if scales:
        weights *= scales[1] if here is None else jnp.where(weights > 0, scales[1], 0.0)
    refs.sum[...] = refs.sum[...] * shrink + product(weights.astype(dtype), values, 1, 0)


def _inside(shape, axis, here):
    key = lax.broadcasted_iota(jnp.int32, shape, axis)
    return (key >= here[0]) & (key < here[1])
