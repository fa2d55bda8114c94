"""The gradient of grouped weights for TPUs: of each group, the sum over its rows of outer products.

Letters: M rows, E groups, C and D the columns of the two arrays. A group's rows of the narrower array
stay in VMEM, whole, while tiles of `columns` columns of the wider one pass by; so both are read once
where a group's rows fit, and the result, the largest array by far, is written once. plan.py: visits.

The sum over a pass of rows is one product. Rows that are not of the group are made zeros in VMEM before.
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
from llm_jax.kernels.grouped_matmul.tpu import LANES, each_pass, each_piece, product, start, up, wait


@dataclasses.dataclass(frozen=True)
class WeightBlocks:
    """rows: of a visit, at most. columns: of the wider array at a time. tile: columns of `left` computed
    at a time. passes: numbers of rows that may be summed over at a time, ascending; the last one divides
    `rows`. buffers: of everything that is transferred. Rows and passes: multiples of 16, columns and
    tile of 128.
    """

    rows: int
    columns: int
    tile: int
    passes: tuple[int, ...]
    buffers: int = 2


class _Refs(NamedTuple):
    """What the kernel works on; HBM as it was given, the rest its own."""

    core: Any  # which one this is
    sizes: Any  # SMEM [E]
    left: Any  # HBM [M, C]
    right: Any  # HBM [M, D]
    out: Any  # HBM [E, C, D]
    visits: Visits
    left_buf: Any  # [buffers, rows, C or columns]
    right_buf: Any  # [buffers, rows, columns or D]
    out_buf: Any  # [buffers, C or columns, columns or D]
    total: Any  # float32, the sums so far of a group that takes more than one pass
    left_done: Any
    right_done: Any
    out_done: Any


class _Step(NamedTuple):
    """A place in the order of the work: groups, of each the tiles of columns, of each the visits."""

    visit: Any  # the group's first
    tile: Any
    more: Any  # visits after the first
    step: Any  # steps before this one
    fetches: Any  # of rows of the narrower array before this one


def weights_gradient(
    left: jax.Array,
    right: jax.Array,
    group_sizes: jax.Array,
    *,
    blocks: WeightBlocks,
    cores: int,
    vmem_limit: int,
    interpret: Any = False,
) -> jax.Array:
    """out [E, C, D] in the dtype of left: for each group the sum of left[i]^T right[i] over its rows.

    left [M, C] and right [M, D] of one dtype, M a multiple of 16, C and D of 128. cores: that share the
    columns of the wider array.
    """
    (rows, columns), depth, groups = left.shape, right.shape[1], group_sizes.shape[0]
    wide = max(columns, depth)
    shape = (blocks.columns, depth) if columns >= depth else (columns, blocks.columns)
    most = most_visits(rows, groups, blocks.rows)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    done = pltpu.SemaphoreType.DMA((blocks.buffers,))
    tiles = -(-wide // (blocks.columns * cores))
    return pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, tiles=tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(cores,),
            in_specs=[anywhere, anywhere],
            out_specs=anywhere,
            scratch_shapes=[
                *(pltpu.SMEM((most,), jnp.int32) for _ in Visits._fields),
                *(pltpu.VMEM((blocks.buffers, blocks.rows, n), left.dtype) for n in shape),
                pltpu.VMEM((blocks.buffers, *shape), left.dtype),
                pltpu.VMEM(shape, jnp.float32),
                *(done, done, done),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((groups, columns, depth), left.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_limit, disable_bounds_checks=True
        ),
        interpret=interpret,
        name="grouped_matmul_weights",
    )(group_sizes, left, right)


def _kernel(sizes, left, right, out, *refs, blocks: WeightBlocks, tiles: int):
    """All groups, with a core's share of the columns."""
    fields = len(Visits._fields)
    r = _Refs(pl.program_id(0), sizes, left, right, out, Visits(*refs[:fields]), *refs[fields:])
    count = write_visits(sizes, r.visits, left.shape[0], blocks.rows, empty=True)
    zero = jnp.int32(0)
    ahead = _Step(zero, zero, zero, zero, zero)
    for _ in range(blocks.buffers - 1):
        _rows_in(r, count, blocks, tiles, start, ahead)
        ahead = _after(r, count, tiles, ahead)

    def step(state):
        here, ahead = state
        _rows_in(r, count, blocks, tiles, start, ahead)
        _rows_in(r, count, blocks, tiles, wait, here)
        _compute(r, here, blocks, tiles)
        return _after(r, count, tiles, here), _after(r, count, tiles, ahead)

    lax.while_loop(lambda s: s[0].visit < count, step, (_Step(*[zero] * 5), ahead))
    for i in range(min(blocks.buffers, tiles * sizes.shape[0])):
        _tile_out(r, wait, tiles, jnp.int32(i), zero, zero)


def _fetches(r: _Refs, at: _Step):
    """Whether the rows of the narrower array come at this step, or are there already."""
    return (at.tile == 0) | (_of(r.visits.count, at) > 1)


def _of(field, at: _Step):
    """A number of the group's first visit; of the last one there is, if `at` is after the end."""
    return field[jnp.minimum(at.visit, field.shape[0] - 1)]


def _after(r: _Refs, count, tiles: int, at: _Step) -> _Step:
    """The step after this one."""
    live = at.visit < count
    visits = _of(r.visits.count, at)
    next_tile = at.more + 1 >= visits
    next_group = next_tile & (at.tile + 1 >= tiles)
    return _Step(
        visit=jnp.where(live & next_group, at.visit + visits, at.visit),
        tile=jnp.where(next_group, 0, at.tile + next_tile.astype(jnp.int32)),
        more=jnp.where(next_tile, 0, at.more + 1),
        step=at.step + 1,
        fetches=at.fetches + (live & _fetches(r, at)).astype(jnp.int32),
    )


def _rows_in(r: _Refs, count, blocks: WeightBlocks, tiles: int, act, at: _Step):
    """Starts, or waits for, the rows of both arrays of a step; then makes those of others zeros."""
    left_wide = r.left.shape[1] >= r.right.shape[1]
    wide, narrow = (r.left, r.left_buf, r.left_done), (r.right, r.right_buf, r.right_done)
    if not left_wide:
        wide, narrow = narrow, wide

    @pl.when(at.visit < count)
    def _():
        visit = at.visit + at.more
        first = pl.multiple_of(r.visits.first[visit], UNIT)
        inside, end = r.visits.inside[visit], r.visits.end[visit]

        def bring(hbm, buffer, done, slot, columns):
            def one(row, size):
                rows = pl.ds(pl.multiple_of(first + row, UNIT), size)
                to = buffer.at[slot, pl.ds(row, size)]
                act(pltpu.make_async_copy(hbm.at[rows, columns], to, done.at[slot]))

            each_piece(up(end, UNIT), min(hbm.shape[0], buffer.shape[1]), one)
            if act is wait:
                _only_rows(buffer.at[slot], inside, end, blocks.passes[-1])

        of_wide = _columns(r, wide[0], wide[1].shape[2], tiles, at.tile)
        bring(*wide, at.step % wide[1].shape[0], of_wide)
        whole = pl.ds(0, narrow[0].shape[1])
        pl.when(_fetches(r, at))(lambda: bring(*narrow, at.fetches % narrow[1].shape[0], whole))


def _columns(r: _Refs, array, width: int, tiles: int, tile):
    """Where a core's tile lies among the columns; the last one overlaps the one before."""
    at = jnp.minimum((r.core * tiles + tile) * width, array.shape[1] - width)
    return pl.ds(pl.multiple_of(at, LANES), width)


def _only_rows(buffer, inside, end, largest: int):
    """Makes rows before `inside` and from `end` on zeros, up to the end of the last pass."""
    unit, width = (UNIT, buffer.shape[1]), buffer.shape[1]

    def keep(first, low, high):
        rows = pl.ds(pl.multiple_of(first, UNIT), UNIT)
        row = lax.broadcasted_iota(jnp.int32, unit, 0)
        buffer[rows] = jnp.where((row >= low) & (row < high), buffer[rows], 0)

    pl.when((inside > 0) & (end > 0))(lambda: keep(0, inside, UNIT))
    pl.when(end % UNIT > 0)(lambda: keep(end // UNIT * UNIT, 0, end % UNIT))

    def zeros(i, _):
        buffer[pl.ds(pl.multiple_of(i * UNIT, UNIT), UNIT)] = jnp.zeros((UNIT, width), buffer.dtype)

    lax.fori_loop(up(end, UNIT) // UNIT, up(end, largest) // UNIT, zeros, None)


def _tile_out(r: _Refs, act, tiles: int, slot, group, tile):
    """Starts, or waits for, writing a tile of a group's result."""
    rows, columns = r.out_buf.shape[1:]
    to = r.out.at[group]
    if rows < r.out.shape[1]:
        to = to.at[_columns(r, r.left, rows, tiles, tile)]
    elif columns < r.out.shape[2]:
        to = to.at[:, _columns(r, r.right, columns, tiles, tile)]
    act(pltpu.make_async_copy(r.out_buf.at[slot], to, r.out_done.at[slot]))


def _compute(r: _Refs, at: _Step, blocks: WeightBlocks, tiles: int):
    """Adds a visit's products to the sums of its group; begins to write them with the last one."""
    visit = at.visit + at.more
    group, visits, end = r.visits.group[visit], r.visits.count[visit], r.visits.end[visit]
    stays = (at.fetches - 1 + _fetches(r, at).astype(jnp.int32)) % blocks.buffers
    moves = at.step % blocks.buffers
    left_wide = r.left.shape[1] >= r.right.shape[1]
    left = r.left_buf.at[moves if left_wide else stays]
    right = r.right_buf.at[stays if left_wide else moves]
    number = group * tiles + at.tile
    slot = number % blocks.buffers
    out, parts = r.out_buf.at[slot], r.total.shape[0] // blocks.tile

    def each_part(act):
        def one(i, _):
            act(pl.ds(pl.multiple_of(i * blocks.tile, blocks.tile), blocks.tile))

        lax.fori_loop(0, parts, one, None)

    def products(first, size, part):
        rows = pl.ds(pl.multiple_of(first, UNIT), size)
        return product(left[rows, part], right[rows], 0, 0)

    last = at.more + 1 == visits
    pl.when((at.more == 0) & (number >= blocks.buffers))(
        lambda: _tile_out(r, wait, tiles, slot, group, at.tile)
    )
    at_once = (visits == 1) & (end <= blocks.passes[-1])

    def store(size, part):
        out[part] = products(0, size, part).astype(out.dtype)

    for below, size in zip((0, *blocks.passes), blocks.passes, strict=False):
        needed = at_once & (end > below) & (end <= size)
        pl.when(needed)(functools.partial(each_part, functools.partial(store, size)))

    def add(first, size):
        begins = (at.more == 0) & (first == 0)

        def one(part):
            total = jnp.where(begins, 0.0, r.total[part]) + products(first, size, part)
            r.total[part] = total
            out[part] = total.astype(out.dtype)

        each_part(one)

    pl.when(~at_once)(lambda: each_pass(end, blocks.passes, add))

    def zeros(part):
        out[part] = jnp.zeros((blocks.tile, out.shape[1]), out.dtype)

    pl.when(end == 0)(lambda: each_part(zeros))
    pl.when(last)(lambda: _tile_out(r, start, tiles, slot, group, at.tile))
