"""Grouped products at shapes of models: `python scripts/kernel_report.py --kernel=grouped_matmul`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.cases import KernelCase, sizes
from llm_jax.kernels.chips import ChipRule, chip_rule
from llm_jax.kernels.grouped_matmul.api import grouped_matmul
from llm_jax.kernels.grouped_matmul.plan import UNIT
from llm_jax.kernels.grouped_matmul.rules import (
    Sizes,
    even_part,
    product_blocks,
    product_key,
    sized_blocks,
    widened_bytes,
)
from llm_jax.kernels.grouped_matmul.tpu import LANES, up
from llm_jax.kernels.tuning import Tuning, distinct

DIRECTIONS = ("forward", "x", "w")
TUNED: tuple[dict[str, Any], ...] = tuple(  # Mixtral-8x7B: gate and up, down; prompts and single tokens
    {"shape": f"8x{rows}x{matrix}", "quantized": quantized}
    for rows in (4096, 64)
    for quantized in (False, True)
    for matrix in ("4096x14336", "14336x4096")
)


def case(
    shape: str = "8x4096x4096x14336",
    direction: str = "forward",
    groups: str = "equal",
    quantized: bool = False,
    dtype: str = "bfloat16",
    block_rows: int = 0,
    block_columns: int = 0,
    buffers: int = 0,
    row_buffers: int = 0,
) -> KernelCase:
    """shape: groups x rows of all of them x K x N. direction: the product, or the gradient of x or w.

    groups: "equal" sizes, as far as the rows go, or "random" ones, whose shares differ by a third.
    quantized: int8 weights with scales. Bytes are counted once: weights of groups with rows.
    block_rows, block_columns, buffers and row_buffers: the `rules.Sizes` of the product; 0 = tuned or by
    the rule. Raises ValueError for another direction, kind of groups, the gradient of int8 weights, and
    sizes of a gradient or some of them without the others.
    """
    count, rows, depth, columns = sizes(shape, "EMKN")
    if direction not in DIRECTIONS or (direction == "w" and quantized):
        raise ValueError(
            f"direction={direction!r}: expected one of {DIRECTIONS}, without 'w' if quantized"
        )
    of_block = Sizes(block_rows, block_columns, buffers, row_buffers)
    if any(of_block) and not (all(of_block) and direction == "forward"):
        raise ValueError(f"{of_block}: give all four or none, and none with direction={direction!r}")
    x = jax.ShapeDtypeStruct((rows, depth), dtype)
    w = jax.ShapeDtypeStruct((count, columns, depth), "int8" if quantized else dtype)
    scale = [jax.ShapeDtypeStruct((count, columns), "float32")] if quantized else []
    of_group = _group_sizes(count, rows, groups)
    itemsize = jnp.dtype(dtype).itemsize
    matrices = count if direction == "w" else int((of_group > 0).sum())
    moved = matrices * depth * columns * w.dtype.itemsize + rows * (depth + columns) * itemsize
    function = functools.partial(
        _product, direction=direction, of_block=of_block if all(of_block) else None
    )
    arrays = (x, w, of_group, jax.ShapeDtypeStruct((rows, columns), dtype), *scale)
    if direction == "forward":
        arrays = (*arrays[:3], *scale)
    return KernelCase(function, arrays, 2.0 * rows * depth * columns, moved)


def _group_sizes(count: int, rows: int, kind: str) -> np.ndarray:
    """int32 [count]."""
    if kind == "equal":
        return np.diff(np.arange(count + 1) * rows // count).astype(np.int32)
    if kind != "random":
        raise ValueError(f"groups={kind!r}: expected 'equal' or 'random'")
    rng = np.random.default_rng(0)
    return rng.multinomial(rows, rng.dirichlet(np.full(count, 8.0))).astype(np.int32)


def _product(x, w, of_group, *rest, direction, of_block):
    """The product, or the gradient of x or w; `rest`: first that of the product, then scales."""
    widened = widened_bytes(x.shape[1], x.dtype.itemsize, w.dtype.itemsize)
    blocks = of_block and sized_blocks(chip_rule(), len(x), len(w), of_block, widened)
    product = functools.partial(
        grouped_matmul, group_sizes=of_group, implementation="pallas", blocks=blocks
    )
    if direction == "forward":
        return product(x, w, scale=rest[0] if rest else None)
    grad, *scale = rest
    product = functools.partial(product, scale=scale[0] if scale else None)
    if direction == "x":
        return jax.vjp(lambda x: product(x, w), x)[1](grad)[0]
    return jax.vjp(lambda w: product(x, w), w)[1](grad)[0]


def tuning(
    rule: ChipRule, shape: str, groups: str = "equal", quantized: bool = False, dtype: str = "bfloat16"
) -> Tuning:
    """Sizes to try for the product of such a `case`: narrower, wider, fewer rows, other buffers."""
    count, rows, depth, columns = sizes(shape, "EMKN")
    of_weights = "int8" if quantized else dtype
    itemsizes = jnp.dtype(dtype).itemsize, jnp.dtype(of_weights).itemsize
    blocks = product_blocks(rule, rows, count, depth, columns, *itemsizes)
    by_rule = Sizes(blocks.rows, blocks.columns, blocks.buffers, blocks.row_buffers)
    tried = [by_rule]
    for width in (blocks.columns // 2, blocks.columns * 2):
        even = even_part(up(columns // rule.cores, LANES), width)
        tried.append(by_rule._replace(block_columns=even))
    tried.append(by_rule._replace(block_rows=up(blocks.rows // 2, UNIT)))
    tried.append(by_rule._replace(buffers=5 - min(blocks.buffers, 3)))  # 3 for 2, 2 for 3
    tried.append(by_rule._replace(row_buffers=3 - blocks.row_buffers))
    options = {"shape": shape, "groups": groups, "quantized": quantized, "dtype": dtype}
    key = product_key(rows, count, depth, columns, dtype, of_weights)
    return Tuning(key, options, distinct([each._asdict() for each in tried]))
