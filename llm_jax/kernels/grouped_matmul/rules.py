"""Blocks for a chip's VMEM; the sizes were found by the count of the compiler's code."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from llm_jax.kernels.chips import MIB, ChipRule
from llm_jax.kernels.grouped_matmul.plan import UNIT
from llm_jax.kernels.grouped_matmul.tpu import FEW, LANES, Blocks, up
from llm_jax.kernels.grouped_matmul.tpu_weights import WeightBlocks
from llm_jax.kernels.tuning import bucket, table_key, tuned

MOST_ROWS = 2048  # of a visit: 2,048 operations for a byte of bfloat16 weights, more than a chip needs
SUMMED = {128: (128, 256, 512), 256: (256, 512, 768)}  # ChipRule.pass_rows: rows summed over at a time


class Sizes(NamedTuple):
    """What a table says of `Blocks`; the passes follow from the rows."""

    block_rows: int
    block_columns: int
    buffers: int
    row_buffers: int


def product_plan(
    rule: ChipRule,
    rows: int,
    groups: int,
    depth: int,
    columns: int,
    dtype: DTypeLike,
    weight_dtype: DTypeLike,
) -> Blocks:
    """Of x times w: tuned blocks, or those of `product_blocks`, which also says what is raised."""
    key = product_key(rows, groups, depth, columns, dtype, weight_dtype)
    itemsizes = jnp.dtype(dtype).itemsize, jnp.dtype(weight_dtype).itemsize
    found = tuned("grouped_matmul", rule.name, key, Sizes)
    if found is not None:
        return sized_blocks(rule, rows, groups, found, widened_bytes(depth, *itemsizes))
    return product_blocks(rule, rows, groups, depth, columns, *itemsizes)


def product_key(
    rows: int, groups: int, depth: int, columns: int, dtype: DTypeLike, weight_dtype: DTypeLike
) -> str:
    """Of the table of tuned blocks."""
    words = jnp.dtype(dtype), jnp.dtype(weight_dtype)
    return table_key(*words, groups=groups, rows=bucket(rows), depth=depth, columns=columns)


def widened_bytes(depth: int, itemsize: int, weight_itemsize: int) -> int:
    """Of a column of weights as x has its numbers, where they have fewer bytes; else 0."""
    return 0 if weight_itemsize == itemsize else depth * itemsize


def sized_blocks(rule: ChipRule, rows: int, groups: int, sizes: Sizes, widened: int) -> Blocks:
    """Blocks of these sizes for M rows of E groups: of fewer rows where M is smaller.

    widened: see `widened_bytes`.
    """
    wide = widened * sizes.block_columns
    most = min(sizes.block_rows, up(max(rows, _fewest_rows(rule, wide)), UNIT))
    passes = _passes(rule, rows, groups, most, wide)
    most = most // passes[-1] * passes[-1]
    return Blocks(most, sizes.block_columns, passes, sizes.buffers, sizes.row_buffers)


def product_blocks(
    rule: ChipRule, rows: int, groups: int, depth: int, columns: int, itemsize: int, weight_itemsize: int
) -> Blocks:
    """Of `tpu.grouped_product`: M rows of this depth, of E groups, and this many columns of the result.

    Weights come in tiles of up to 8 MiB (an eighth of a small VMEM). What is left of VMEM is for rows of
    a group: the more there are, the less often weights are read. Raises ValueError where nothing fits.
    """
    most = min(8 * MIB, rule.vmem_bytes // 8) // (itemsize // 2)
    width = even_part(up(columns // rule.cores, LANES), most // (depth * itemsize))
    scales = 0 if weight_itemsize == itemsize else 4 * groups * max(depth, columns)
    wide = width * widened_bytes(depth, itemsize, weight_itemsize)
    fixed = scales + wide + up(columns, width) * UNIT * itemsize
    needed = min(up(max(rows, _fewest_rows(rule, wide)), UNIT), MOST_ROWS)
    found = []
    for row_buffers, buffers in ((2, 3), (2, 2), (1, 2)):
        left = budget(rule) - fixed - buffers * width * depth * weight_itemsize
        fit = int(left / ((row_buffers * depth + 2 * width) * itemsize))
        found.append(Blocks(_whole(min(fit, needed), rule.pass_rows), width, (), buffers, row_buffers))
    # The first one with enough rows; else the one with most.
    enough = [b for b in found if b.rows >= min(needed, 2 * rule.pass_rows)]
    best = enough[0] if enough else max(found, key=lambda b: b.rows)
    if best.rows < UNIT:
        raise ValueError(f"{rule.name}: rows and weights of depth {depth} do not fit VMEM")
    passes = _passes(rule, rows, groups, best.rows, wide)
    return Blocks(best.rows, width, passes, best.buffers, best.row_buffers)


def _fewest_rows(rule: ChipRule, wide: int) -> int:
    """Of a visit, where FEW rows are too few; else 0. wide: bytes of widened weights.

    FEW rows take weights as they are widened, instead of from a place for them; the compiler spills what
    is widened, and a small VMEM has no room for much of that.
    """
    return 2 * FEW if rule.vmem_bytes < 32 * MIB and wide > rule.vmem_bytes // 6 else 0


def _passes(rule: ChipRule, rows: int, groups: int, most: int, wide: int) -> tuple[int, ...]:
    """Numbers of rows computed at a time, of M rows in E groups, in visits of `most`."""
    few = (FEW,) if rows < 2 * FEW * groups and not _fewest_rows(rule, wide) else ()
    passes = (*few, rule.pass_rows // 2, rule.pass_rows)
    return (*(n for n in passes if n < most), most) if most < passes[-1] else passes


def weight_blocks(rule: ChipRule, rows: int, columns: int, depth: int, itemsize: int) -> WeightBlocks:
    """Of `tpu_weights.weights_gradient`: M rows of two arrays with this many columns.

    A tile of the result is the largest, up to 8 MiB, that leaves VMEM to enough rows. Raises ValueError
    where nothing fits.
    """
    narrow, wide = min(columns, depth), max(columns, depth)
    passes, needed = SUMMED[rule.pass_rows], min(up(rows, UNIT), MOST_ROWS)
    found = []
    for size, buffers in ((size, n) for size in (8, 4, 2, 1) for n in (3, 2)):
        width = even_part(up(wide // rule.cores, LANES), size * MIB // (narrow * itemsize))
        left = budget(rule) - width * narrow * (buffers * itemsize + 4)
        fit = min(int(left / (buffers * (width + narrow) * itemsize)), needed)
        largest = next((n for n in reversed(passes) if n <= fit), UNIT)
        found.append((fit // largest * largest, width, buffers))
    enough = [each for each in found if each[0] >= min(needed, passes[-1])]
    most, width, buffers = enough[0] if enough else max(found)
    if most < UNIT:
        raise ValueError(f"{rule.name}: a gradient of {narrow} columns does not fit VMEM")
    passes = tuple(n for n in passes if n <= most) or (most,)
    of_left, of_right = (width, narrow) if columns >= depth else (narrow, width)
    area = rule.pass_rows * 4096 // (itemsize // 2)  # of a product that is one piece of code
    tiles = [n for n in range(LANES, of_left + 1, LANES) if of_left % n == 0 and n * of_right <= area]
    return WeightBlocks(most, width, max(tiles, default=LANES), passes, buffers)


def budget(rule: ChipRule) -> int:
    """Bytes of VMEM for blocks; the rest is for what the compiler puts there."""
    return rule.vmem_bytes * 13 // 16


def vmem_limit(rule: ChipRule) -> int:
    """Bytes of VMEM that a kernel may take, blocks and all."""
    return rule.vmem_bytes * 15 // 16


def even_part(columns: int, most: int) -> int:
    """The width of the fewest tiles of about `most` columns, with the least overlap at their end."""
    unit = LANES if columns < 4 * LANES or most < 2 * LANES else 2 * LANES
    parts = math.ceil(columns / max(most // unit * unit, LANES))
    return min(up(math.ceil(columns / parts), unit), columns)


def _whole(rows: int, multiple: int) -> int:
    """As many rows at most: a multiple of this, or of 16 if there are fewer."""
    multiple = multiple if rows >= multiple else UNIT
    return rows // multiple * multiple
