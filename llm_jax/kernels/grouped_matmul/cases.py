"""Grouped products at shapes of models: `python scripts/kernel_report.py --kernel=grouped_matmul`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.cases import KernelCase, sizes
from llm_jax.kernels.grouped_matmul.api import grouped_matmul

DIRECTIONS = ("forward", "x", "w")


def case(
    shape: str = "8x4096x4096x14336",
    direction: str = "forward",
    groups: str = "equal",
    quantized: bool = False,
    dtype: str = "bfloat16",
) -> KernelCase:
    """shape: groups x rows of all of them x K x N. direction: the product, or the gradient of x or w.

    groups: "equal" sizes, as far as the rows go, or "random" ones, whose shares differ by a third.
    quantized: int8 weights with scales. Bytes are counted once: weights of groups with rows.
    Raises ValueError for another direction, kind of groups, or the gradient of int8 weights.
    """
    count, rows, depth, columns = sizes(shape, "EMKN")
    if direction not in DIRECTIONS or (direction == "w" and quantized):
        raise ValueError(
            f"direction={direction!r}: expected one of {DIRECTIONS}, without 'w' if quantized"
        )
    x = jax.ShapeDtypeStruct((rows, depth), dtype)
    w = jax.ShapeDtypeStruct((count, columns, depth), "int8" if quantized else dtype)
    scale = [jax.ShapeDtypeStruct((count, columns), "float32")] if quantized else []
    of_group = _group_sizes(count, rows, groups)
    itemsize = jnp.dtype(dtype).itemsize
    matrices = count if direction == "w" else int((of_group > 0).sum())
    moved = matrices * depth * columns * w.dtype.itemsize + rows * (depth + columns) * itemsize
    function = functools.partial(_product, direction=direction)
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


def _product(x, w, of_group, *rest, direction):
    """The product, or the gradient of x or w; `rest`: first that of the product, then scales."""
    product = functools.partial(grouped_matmul, group_sizes=of_group, implementation="pallas")
    if direction == "forward":
        return product(x, w, scale=rest[0] if rest else None)
    grad, *scale = rest
    product = functools.partial(product, scale=scale[0] if scale else None)
    if direction == "x":
        return jax.vjp(lambda x: product(x, w), x)[1](grad)[0]
    return jax.vjp(lambda w: product(x, w), w)[1](grad)[0]
