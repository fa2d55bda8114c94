"""The keys and values of chunks of new tokens into their pages, for TPUs.

Letters: T tokens, R rows, K key/value heads, H head dim, L layers, P pages of Z tokens, M pages of a
row.

A page is fetched, the row's new tokens are put into it and it goes back. The tokens of a page lie
anywhere among the new ones: a window around them, which DMAs can fetch, is turned until they fit.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm_jax.kernels.paged_attention.scales import page_scales, token_of_lane
from llm_jax.kernels.paged_attention.types import CHUNK_ALIGNMENT

IN_FLIGHT = 2  # pages that are on their way back


class _Refs(NamedTuple):
    """Scalars in SMEM, arrays in HBM, buffers in VMEM, semaphores."""

    scalars: Any  # layer, first row, rows
    table: Any
    starts: Any
    counts: Any
    lengths: Any
    new: Any  # keys, values, their scales if quantized
    pages: Any  # pages, their scales if quantized
    window: Any
    page: Any
    read: Any
    written: Any


def write_pages(
    new: tuple[jax.Array, ...],
    pages: tuple[jax.Array, ...],
    layer: jax.Array,
    table: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    lengths: jax.Array,
    first: jax.Array,
    rows: jax.Array,
    *,
    kv_heads: int,
    cores: int,
    vmem_limit: int,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """pages with the tokens of rows first <= r < rows in them, in place.

    new: keys and values [T, K H], and for 8-bit pages, as whose numbers they are given, scales [T, 128]
    float32, of K keys and then K values; T is a multiple of 16 and at least Z + 16. pages as
    `decode_attention` takes them. A row's `counts` tokens begin at `starts`, a multiple of 16, and are
    its last of `lengths`, all [R] int32.
    """
    page = pages[0].shape[3]
    count = len(new)
    # Small pages wait for the latency of DMAs, large ones for room.
    step = sum((page + CHUNK_ALIGNMENT) * x.shape[1] * x.dtype.itemsize for x in new)
    step += sum(math.prod(x.shape[2:]) * x.dtype.itemsize for x in pages)
    buffers = max(IN_FLIGHT + 1, min(16, max(4, 1024 // page), vmem_limit // 2 // step))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    scratch = [
        *(pltpu.VMEM((buffers, page + CHUNK_ALIGNMENT, x.shape[1]), x.dtype) for x in new),
        *(pltpu.VMEM((buffers, *x.shape[2:]), x.dtype) for x in pages),
        pltpu.SemaphoreType.DMA((buffers,)),
        pltpu.SemaphoreType.DMA((buffers,)),
    ]
    return pl.pallas_call(
        functools.partial(_kernel, inputs=count, outputs=len(pages), kv_heads=kv_heads, cores=cores),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(cores,),
            in_specs=[anywhere] * (count + len(pages)),
            out_specs=[anywhere] * len(pages),
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pages],
        input_output_aliases={5 + count + i: i for i in range(len(pages))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_limit, disable_bounds_checks=True
        ),
        interpret=interpret,
        name="paged_write",
    )(jnp.stack([layer, first, rows]), table, starts, counts, lengths, *new, *pages)


def _kernel(scalars, table, starts, counts, lengths, *rest, inputs, outputs, kv_heads, cores):
    new, rest = rest[:inputs], rest[inputs + outputs :]  # the pages themselves are the outputs
    pages, window, page = rest[:outputs], rest[outputs : outputs + inputs], rest[outputs + inputs : -2]
    refs = _Refs(scalars, table, starts, counts, lengths, new, pages, window, page, *rest[-2:])
    size, buffers = pages[0].shape[3], page[0].shape[0]
    begin, end = scalars[1] + pl.program_id(0), scalars[2]

    def touched(row):
        """The first page of a row's new tokens and the one after the last."""
        row = jnp.minimum(row, end - 1)
        return (lengths[row] - counts[row]) // size, (lengths[row] + size - 1) // size

    def read(n, row, index):
        """Starts reading what step n needs; returns the step after it."""

        @pl.when(row < end)
        def _():
            for copy in _reads(refs, n % buffers, row, index):
                copy.start()

        more = index + 1 < touched(row)[1]
        following = jnp.where(more, row, row + cores)
        return n + 1, following, jnp.where(more, index + 1, touched(following)[0])

    def wait_written(n):
        @pl.when(n >= 0)
        def _():
            for copy in _writes(refs, n % buffers, 0):
                copy.wait()

    def of_row(row, carry):
        def of_page(index, carry):
            n, cursor = carry[0], carry[1:]
            wait_written(n - IN_FLIGHT)  # its buffer is the one that is read into now
            cursor = read(*cursor)
            for copy in _reads(refs, n % buffers, row, index):
                copy.wait()
            _merge(refs, n % buffers, row, index, kv_heads)
            for copy in _writes(refs, n % buffers, refs.table[row, index]):
                copy.start()
            return n + 1, *cursor

        return lax.fori_loop(*touched(row), of_page, carry)

    @pl.when(begin < end)
    def _():
        cursor = (jnp.int32(0), begin, touched(begin)[0])
        for _ in range(buffers - IN_FLIGHT):
            cursor = read(*cursor)
        steps = (end - begin + cores - 1) // cores
        carry = (jnp.int32(0), *cursor)
        n, *_ = lax.fori_loop(0, steps, lambda i, carry: of_row(begin + i * cores, carry), carry)
        for back in range(IN_FLIGHT, 0, -1):
            wait_written(n - back)


def _place(refs: _Refs, row, index):
    """(first token of the window, where in it the page's first token is) of a page of a row."""
    tokens, size = refs.new[0].shape[0], refs.pages[0].shape[3]
    start = refs.starts[row] + index * size - (refs.lengths[row] - refs.counts[row])
    window = jnp.clip(start // CHUNK_ALIGNMENT * CHUNK_ALIGNMENT, 0, tokens - size - CHUNK_ALIGNMENT)
    return pl.multiple_of(window, CHUNK_ALIGNMENT), start - window


def _reads(refs: _Refs, buffer, row, index):
    size = refs.pages[0].shape[3]
    first, _ = _place(refs, row, index)
    for source, target in zip(refs.new, refs.window, strict=True):
        source = source.at[pl.ds(first, size + CHUNK_ALIGNMENT)]
        yield pltpu.make_async_copy(source, target.at[buffer], refs.read.at[buffer])
    for source, target in zip(refs.pages, refs.page, strict=True):
        source = source.at[refs.scalars[0], refs.table[row, index]]
        yield pltpu.make_async_copy(source, target.at[buffer], refs.read.at[buffer])


def _writes(refs: _Refs, buffer, page):
    for source, target in zip(refs.page, refs.pages, strict=True):
        target = target.at[refs.scalars[0], page]
        yield pltpu.make_async_copy(source.at[buffer], target, refs.written.at[buffer])


def _merge(refs: _Refs, buffer, row, index, kv_heads):
    """Puts a row's new tokens into the page that was fetched."""
    size = refs.pages[0].shape[3]
    _, ahead = _place(refs, row, index)
    whole = size + CHUNK_ALIGNMENT
    turn = jnp.where(ahead > 0, whole - ahead, -ahead)
    end = refs.lengths[row] - index * size
    begin = end - refs.counts[row]

    def turned(window):
        """Its tokens [Z, ...], the page's first one first."""
        return pltpu.roll(window[buffer].astype(jnp.float32), turn, 0)[:size]

    page = refs.page[0]
    place = lax.broadcasted_iota(jnp.int32, page.shape[2:], 0)
    for i, window in enumerate(refs.window[:2]):
        new = turned(window).astype(page.dtype)
        page[buffer, i] = jnp.where((place >= begin) & (place < end), new, page[buffer, i])
    if len(refs.page) > 1:
        scales = refs.page[1]
        place = token_of_lane(scales.shape[1:], size, kv_heads)
        new = page_scales(turned(refs.window[2]), size, kv_heads)
        scales[buffer] = jnp.where((place >= begin) & (place < end), new, scales[buffer])
