"""Quantized matmuls at shapes of models: `python scripts/kernel_report.py --kernel=quantized_matmul`."""

import functools

import jax
import jax.numpy as jnp

from llm_jax.kernels.cases import KernelCase, sizes
from llm_jax.kernels.quantized_matmul.api import quantized_matmul
from llm_jax.kernels.quantized_matmul.tpu import Stream, bits_of
from llm_jax.kernels.quantized_matmul.tpu_tiles import Tiles


def case(
    shape: str = "16x4096x14336",
    weights: str = "int8",
    group: int = 0,
    quantize_x: bool = False,
    activation: str | None = None,
    bias: bool = False,
    residual: bool = False,
    dtype: str = "bfloat16",
    implementation: str = "pallas",
    rows: int = 0,
    depth: int = 0,
    columns: int = 0,
    ahead: int = 0,
) -> KernelCase:
    """shape: M x K x N. group: rows of weights with one scale, 0 = one a column.

    columns and depth, with ahead or with rows: the sizes of `tpu.Stream` or of `tpu_tiles.Tiles`; 0 = by
    the rule of the chip.
    """
    m, k, n = sizes(shape, "MKN")
    given = (rows or ahead, depth, columns)
    if (any(given) and not all(given)) or (rows and ahead):
        sizes_given = f"rows={rows}, ahead={ahead}, depth={depth}, columns={columns}"
        raise ValueError(f"{sizes_given}: give depth, columns and one of rows and ahead, or none")
    blocks = Tiles(rows, depth, columns) if rows else Stream(columns, depth, ahead)
    x = jax.ShapeDtypeStruct((m, k), dtype)
    y = jax.ShapeDtypeStruct((m, n), dtype)
    w = jax.ShapeDtypeStruct((k, n), weights)
    scale = jax.ShapeDtypeStruct((k // group, n) if group else (n,), jnp.float32)
    added = {"bias": jax.ShapeDtypeStruct((n,), jnp.float32)} if bias else {}
    added |= {"residual": y} if residual else {}
    function = functools.partial(
        quantized_matmul,
        activation=activation,
        quantize_x=quantize_x,
        implementation=implementation,
        blocks=blocks if all(given) else None,
    )

    def with_added(x, w, scale, *rest):
        return function(x, w, scale, **dict(zip(added, rest, strict=True)))

    arrays = (x, scale, y, *added.values())
    moved = k * n * bits_of(w.dtype) / 8 + sum(a.size * a.dtype.itemsize for a in arrays)
    return KernelCase(with_added, (x, w, scale, *added.values()), 2.0 * m * k * n, moved)
