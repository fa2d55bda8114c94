"""Grouped matrix product for TPUs: weights pass once by the rows of their group, which stay in VMEM.

Letters: M rows, E groups, D the depth that is summed over, C columns of the result. What makes it fast,
by the count of the compiler's code:

* A visit (see plan.py) brings up to `Blocks.rows` rows of one group, all of their depth, into VMEM. All
  weights of the group pass by in tiles of `Blocks.columns` columns, whole depth. So weights, the largest
  array by far, are read once where a group's rows fit, and the rows and the result once always.
* Visits begin where their group does, not at multiples of a tile. A tile of rows that belong to two
  groups would read the weights of both again. The sixteen rows that two groups share, because HBM's
  tiles do, are left to the later one: the earlier hands its share on in VMEM.
* All transfers are started by hand, weights `Blocks.buffers` - 1 tiles ahead, across visits, so that a
  transfer is always under way: one that is complete 500 ns after its last byte costs a fifth of the
  bandwidth where only the next one is started by then.
* The sum over the depth is a single product to the compiler, which keeps it in registers.
* Rows are computed in passes of Blocks.passes[-1], the rest in the smallest pass that holds it: every
  pass loads all weights into the matrix units, so few large passes cost least.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm_jax.kernels.grouped_matmul.plan import UNIT, Visits, most_visits, write_visits

LANES = 128
CHUNK = 128  # rows of one transfer
FEW = 32  # rows of a group, in decoding


@dataclasses.dataclass(frozen=True)
class Blocks:
    """rows: of a visit, at most. row_buffers: of those rows, 2 = the next visit's come meanwhile.

    columns: of the result at a time. buffers: of the weights for them. passes: numbers of rows that may
    be computed at a time, ascending; the last one divides `rows`. All but the buffers: multiples of 16,
    columns of 128.
    """

    rows: int
    columns: int
    passes: tuple[int, ...]
    buffers: int = 3
    row_buffers: int = 2


class _Refs(NamedTuple):
    """What the kernel works on; HBM as it was given, the rest its own."""

    core: Any  # which one this is
    sizes: Any  # SMEM [E]
    base: Any  # SMEM [1], where the matrices of the groups begin in w
    x: Any  # HBM [M, D]
    w: Any  # HBM [W, C, D] or [W, D, C]
    scale: Any  # None; VMEM [E, C] or [E, C / 128, 128], of columns, or [E, D], of the depth
    out: Any  # HBM [M, C]
    visits: Visits
    x_buf: Any  # [row_buffers, rows, D]
    w_buf: Any  # [buffers, columns, D] or [buffers, D, columns]
    wide: Any  # None, or a tile of the weights in the dtype of x
    out_buf: Any  # [2, rows, columns]
    shared: Any  # [tiles, 16, columns], what the last visit leaves to the next
    x_done: Any
    w_done: Any
    out_done: Any


def grouped_product(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    scale: jax.Array | None,
    base: jax.Array,
    *,
    axis: int,
    blocks: Blocks,
    cores: int,
    vmem_limit: int,
    interpret: Any = False,
) -> jax.Array:
    """out [M, C] in the dtype of x: rows of x times the matrix of their group; 0 for rows of none.

    x [M, D], M a multiple of 16; w [W, C, D] with axis = 2 or [W, D, C] with axis = 1, in the dtype of x
    or int8, of which those of the E groups are the ones from base [] on; scale [E, w.shape[1]] float32
    times each of that axis of w, or None. D and C: multiples of 128. axis: of w, that is summed over.
    cores: that share the columns.
    """
    (rows, depth), groups, columns = x.shape, group_sizes.shape[0], w.shape[3 - axis]
    tiles = -(-columns // (blocks.columns * cores))
    tile = (blocks.columns, depth) if axis == 2 else (depth, blocks.columns)
    most = most_visits(rows, groups + 1, blocks.rows)
    if scale is not None and axis == 2 and blocks.columns == LANES:
        scale = scale.reshape(groups, columns // LANES, LANES)  # see _column_scales
    scales = [] if scale is None else [scale]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    kernel = functools.partial(
        _kernel, axis=axis, blocks=blocks, scaled=bool(scales), wide=w.dtype != x.dtype
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(cores,),
            in_specs=[anywhere, anywhere, *(pl.BlockSpec(memory_space=pltpu.VMEM) for _ in scales)],
            out_specs=anywhere,
            scratch_shapes=[
                *(pltpu.SMEM((most,), jnp.int32) for _ in Visits._fields),
                pltpu.VMEM((blocks.row_buffers, blocks.rows, depth), x.dtype),
                pltpu.VMEM((blocks.buffers, *tile), w.dtype),
                pltpu.VMEM((2, blocks.rows, blocks.columns), x.dtype),
                pltpu.VMEM((tiles, UNIT, blocks.columns), x.dtype),
                pltpu.SemaphoreType.DMA((blocks.row_buffers,)),
                pltpu.SemaphoreType.DMA((blocks.buffers,)),
                pltpu.SemaphoreType.DMA((2,)),
                *([pltpu.VMEM(tile, x.dtype)] if w.dtype != x.dtype else []),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_limit, disable_bounds_checks=True
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(group_sizes, base[None], x, w, *scales)


def _kernel(*refs, axis: int, blocks: Blocks, scaled: bool, wide: bool):
    """All visits, with a core's share of the columns."""
    left = list(refs)
    sizes, base, x, w = (left.pop(0) for _ in range(4))
    scale = left.pop(0) if scaled else None
    out, *fields = (left.pop(0) for _ in range(1 + len(Visits._fields)))
    of_x, of_w, of_out, shared, *done = (left.pop(0) for _ in range(7))
    widened = left.pop(0) if wide else None
    core = pl.program_id(0)
    given = (core, sizes, base, x, w, scale, out)
    r = _Refs(*given, Visits(*fields), of_x, of_w, widened, of_out, shared, *done)
    tiles = r.shared.shape[0]
    count = write_visits(r.sizes, r.visits, x.shape[0], blocks.rows)

    start_x = functools.partial(_rows_in, r, count, start)
    wait_x = functools.partial(_rows_in, r, count, wait)
    start_w = functools.partial(_weights_in, r, count, axis, start)
    wait_w = functools.partial(_weights_in, r, count, axis, wait)
    start_out = functools.partial(_rows_out, r, start)
    wait_out = functools.partial(_rows_out, r, wait)

    if blocks.row_buffers > 1:
        start_x(0)
    for q in range(blocks.buffers - 1):
        start_w(jnp.int32(q))

    def visit(v, _):
        ahead = blocks.row_buffers - 1
        if not ahead:
            start_x(v)
        wait_x(v)
        if ahead:
            start_x(v + 1)
        if scaled and axis == 1:
            _scale_rows(r, v)

        def tile(n, _):
            q = v * tiles + n
            start_w(q + blocks.buffers - 1)
            wait_w(q)
            pl.when(q >= 2)(lambda: wait_out(q - 2))
            _compute(r, v, n, q, axis, blocks)
            start_out(q)

        lax.fori_loop(0, tiles, tile, None)

    lax.fori_loop(0, count, visit, None)
    last = count * tiles - 1
    pl.when(last >= 1)(lambda: wait_out(last - 1))
    wait_out(last)


def start(copy):
    """Begins a transfer."""
    copy.start()


def wait(copy):
    """Until a transfer is complete."""
    copy.wait()


def each_piece(rows, most: int, act):
    """act(first row, how many) for the transfers of `rows` rows, a multiple of 16, at most `most`."""
    size = min(CHUNK, 1 << (most.bit_length() - 1))
    lax.fori_loop(0, rows // size, lambda i, _: act(pl.multiple_of(i * size, size), size), None)
    size //= 2
    while size >= UNIT:
        first = pl.multiple_of(rows // (2 * size) * (2 * size), 2 * size)
        pl.when((rows & size) > 0)(functools.partial(act, first, size))
        size //= 2


def _rows_in(r: _Refs, count, act, v):
    """Starts, or waits for, the rows of visit v, if it has weights."""
    inside = jnp.minimum(v, count - 1)
    first, slot = pl.multiple_of(r.visits.first[inside], UNIT), v % r.x_buf.shape[0]

    def one(at, size):
        source = r.x.at[pl.ds(pl.multiple_of(first + at, UNIT), size)]
        act(pltpu.make_async_copy(source, r.x_buf.at[slot, pl.ds(at, size)], r.x_done.at[slot]))

    live = (v < count) & (r.visits.group[inside] < r.sizes.shape[0])
    pl.when(live)(lambda: each_piece(up(r.visits.end[inside], UNIT), _most(r), one))


def _most(r: _Refs) -> int:
    """Rows that a visit can have."""
    return min(r.x.shape[0], r.x_buf.shape[1])


def _columns(r: _Refs, n):
    """Where tile n of this core lies among the columns; the last one overlaps the one before."""
    width, columns = r.out_buf.shape[2], r.out.shape[1]
    at = (r.core * r.shared.shape[0] + n) * width
    return pl.ds(pl.multiple_of(jnp.minimum(at, columns - width), LANES), width)


def _weights_in(r: _Refs, count, axis: int, act, q):
    """Starts, or waits for, the weights of step q, if it has any."""
    v = q // r.shared.shape[0]
    at, slot = _columns(r, q - v * r.shared.shape[0]), q % r.w_buf.shape[0]
    group = r.visits.group[jnp.minimum(v, count - 1)]

    @pl.when((v < count) & (group < r.sizes.shape[0]))
    def _():
        matrix = r.base[0] + group
        source = r.w.at[matrix, at] if axis == 2 else r.w.at[matrix, :, at]
        act(pltpu.make_async_copy(source, r.w_buf.at[slot], r.w_done.at[slot]))


def _rows_out(r: _Refs, act, q):
    """Starts, or waits for, writing the rows of step q that no later visit has a share of."""
    v = q // r.shared.shape[0]
    at_columns, slot = _columns(r, q - v * r.shared.shape[0]), q % 2
    first = pl.multiple_of(r.visits.first[v], UNIT)

    def one(at, size):
        to = r.out.at[pl.ds(pl.multiple_of(first + at, UNIT), size), at_columns]
        act(pltpu.make_async_copy(r.out_buf.at[slot, pl.ds(at, size)], to, r.out_done.at[slot]))

    each_piece(r.visits.end[v] // UNIT * UNIT, _most(r), one)


def _scale_rows(r: _Refs, v):
    """Multiplies the rows of visit v by the scales of their group, where they belong to the depth."""
    group, slot = r.visits.group[v], v % r.x_buf.shape[0]

    def one(i, _):
        at = pl.ds(pl.multiple_of(i * UNIT, UNIT), UNIT)
        x = r.x_buf[slot, at].astype(jnp.float32) * r.scale[pl.ds(group, 1)]
        r.x_buf[slot, at] = x.astype(r.x_buf.dtype)

    pl.when(group < r.sizes.shape[0])(
        lambda: lax.fori_loop(0, up(r.visits.end[v], UNIT) // UNIT, one, None)
    )


def _column_scales(r: _Refs, group, n):
    """Of the columns of tile n, [1, C'].

    Mosaic refuses to load one register of lanes at a place that the program computes; a row of as many
    it loads. So scales for tiles of 128 columns come as [E, C / 128, 128].
    """
    at = _columns(r, n)
    if len(r.scale.shape) == 2:
        return r.scale[pl.ds(group, 1), at]
    return r.scale[group, pl.ds(at.start // LANES, 1)]


def _compute(r: _Refs, v, n, q, axis: int, blocks: Blocks):
    """The rows of visit v and the columns of tile n, into the output buffer."""
    group, inside, end = r.visits.group[v], r.visits.inside[v], r.visits.end[v]
    out, x = r.out_buf.at[q % 2], r.x_buf.at[v % r.x_buf.shape[0]]
    w = r.w_buf.at[q % r.w_buf.shape[0]]

    @pl.when(group < r.sizes.shape[0])
    def _():
        def rows(weights, first, size):
            at = pl.ds(pl.multiple_of(first, UNIT), size)
            result = product(x[at], weights[...].astype(x.dtype), 1, axis - 1)
            if r.scale is not None and axis == 2:
                result *= _column_scales(r, group, n)
            out[at] = result.astype(out.dtype)

        if r.wide is None:
            each_pass(end, blocks.passes, functools.partial(rows, w))
            return
        # Weights of fewer bytes are widened once for several passes, on their way for a few rows.
        few = blocks.passes[0] if blocks.passes[0] <= FEW else 0
        if few:
            pl.when(end <= few)(lambda: rows(w, 0, few))

        @pl.when(end > few)
        def _():
            _widen(r.wide, w)
            passes = blocks.passes[1:] if few and blocks.passes[1:] else blocks.passes
            each_pass(end, passes, functools.partial(rows, r.wide))

    @pl.when(group == r.sizes.shape[0])
    def _():
        def zeros(i, _):
            out[pl.ds(pl.multiple_of(i * UNIT, UNIT), UNIT)] = jnp.zeros((UNIT, out.shape[1]), out.dtype)

        lax.fori_loop(0, up(end, UNIT) // UNIT, zeros, None)

    @pl.when(inside > 0)
    def _():
        before = lax.broadcasted_iota(jnp.int32, (UNIT, out.shape[1]), 0) < inside
        out[:UNIT] = jnp.where(before, r.shared[n], out[:UNIT])

    last = jnp.minimum(end // UNIT * UNIT, blocks.rows - UNIT)
    r.shared[n] = out[pl.ds(pl.multiple_of(last, UNIT), UNIT)]


def _widen(to, weights):
    """to = weights, so many rows at a time that the loop costs little and its code stays short."""
    rows, columns = to.shape
    size = next(n for n in range(rows, 0, -32) if rows % n == 0 and n * columns <= 1 << 19)

    def one(i, _):
        at = pl.ds(pl.multiple_of(i * size, size), size)
        to[at] = weights[at].astype(to.dtype)

    lax.fori_loop(0, rows // size, one, None)


def each_pass(rows, passes: tuple[int, ...], compute):
    """compute(first row, how many) for passes that cover `rows` rows: of the largest, then one more."""
    largest, smaller = passes[-1], passes[:-1]
    rest = rows % largest
    more = rest > (smaller[-1] if smaller else 0)
    whole = rows // largest + more.astype(jnp.int32)
    lax.fori_loop(0, whole, lambda i, _: compute(i * largest, largest), None)
    for size, below in zip(smaller, (0, *smaller), strict=False):
        needed = (rest > below) & (rest <= size)
        pl.when(needed)(functools.partial(compute, whole * largest, size))


def up(n, multiple: int):
    """n or the next multiple."""
    return (n + (multiple - 1)) // multiple * multiple


def product(x: jax.Array, y: jax.Array, of_x: int, of_y: int) -> jax.Array:
    """The sum over these axes, in float32; float32 operands are not rounded to bfloat16."""
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = (((of_x,), (of_y,)), ((), ()))
    return lax.dot_general(x, y, axes, precision=exact, preferred_element_type=jnp.float32)
