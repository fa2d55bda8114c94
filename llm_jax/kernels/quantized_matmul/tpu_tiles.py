"""Many rows times quantized weights: each block of weights is dequantized once for all rows."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm_jax.kernels.quantized_matmul.reference import finish
from llm_jax.kernels.quantized_matmul.tpu import Decode, factor, plain, times


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows of x, depth and columns of weights in a step."""

    rows: int
    depth: int
    columns: int


def tiles(
    layer: jax.Array,
    x: jax.Array,
    row_scale: jax.Array | None,
    w: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    *,
    blocks: Tiles,
    dtype: jnp.dtype,
    units: jnp.dtype,
    decode: Decode,
    activation: str | None,
    vmem_limit: int,
    interpret: bool = False,
) -> jax.Array:
    """activation(x w + bias) + residual [M, N] in `dtype`; x [M, K], scale [groups, N].

    w [layers, K, N], of which layer [1] int32 is taken. row_scale [M, 1] float32, of an x that is int8
    or was. units: dtype that the matrix units are given, also that of x: int8 where both are integers
    and there is one group, else bfloat16 or float32, to which weights of groups are rounded after their
    scale. The weights of a column of blocks stay in VMEM, dequantized, for all rows.
    """
    (rows, depth), columns, groups = x.shape, w.shape[2], scale.shape[0]
    bm, bk, bn = blocks.rows, blocks.depth, blocks.columns
    grid = (pl.cdiv(columns, bn), pl.cdiv(rows, bm), pl.cdiv(depth, bk))

    def of_weights(j, i, k, layer):  # not fetched again for other rows
        return layer[0], jnp.where(i == 0, k, grid[2] - 1), j

    if groups > 1:  # in parts, as the steps need them
        group = depth // groups
        scale = scale.reshape(-1, max(bk // group, 1), columns)

    def of_scales(j, i, k, layer):
        _, k, j = of_weights(j, i, k, layer)
        return k * bk // max(group, bk), 0, j

    specs = {
        "x": (x, pl.BlockSpec((bm, bk), lambda j, i, k, _: (i, k))),
        "row_scale": (row_scale, pl.BlockSpec((bm, 1), lambda j, i, k, _: (i, 0))),
        "w": (w, pl.BlockSpec((None, bk, bn), of_weights)),
        "scale": (
            scale,
            pl.BlockSpec((1, bn), lambda j, i, k, _: (0, j))
            if groups == 1
            else pl.BlockSpec((None, scale.shape[1], bn), of_scales),
        ),
        "bias": (bias, pl.BlockSpec((1, bn), lambda j, i, k, _: (0, j))),
        "residual": (residual, pl.BlockSpec((bm, bn), lambda j, i, k, _: (i, j))),
    }
    specs = {name: pair for name, pair in specs.items() if pair[0] is not None}
    sums = jnp.int32 if units == jnp.int8 else jnp.float32
    return pl.pallas_call(
        functools.partial(
            _tiles_kernel,
            names=tuple(specs),
            depth=depth,
            grouped=groups > 1,
            decode=decode,
            activation=activation,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[spec for _, spec in specs.values()],
            out_specs=pl.BlockSpec((bm, bn), lambda j, i, k, _: (i, j)),
            scratch_shapes=[pltpu.VMEM((grid[2], bk, bn), units), pltpu.VMEM((bm, bn), sums)],
        ),
        out_shape=jax.ShapeDtypeStruct((rows, columns), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_limit,
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="quantized_matmul",
    )(layer, *(array for array, _ in specs.values()))


def _tiles_kernel(layer_ref, *args, names, depth, grouped, decode, activation):
    """One block of rows by one of columns, a part of the depth."""
    del layer_ref
    refs: dict[str, Any] = dict(zip(names, args, strict=False))
    out_ref, kept_ref, sum_ref = args[len(names) :]
    i, k, steps = pl.program_id(1), pl.program_id(2), pl.num_programs(2)
    size = kept_ref.shape[1]
    ragged = depth % size

    @pl.when(i == 0)
    def _():
        weights = plain(refs["w"][...], decode)
        if grouped:
            weights = times(weights.astype(jnp.float32), refs["scale"][...] * factor(decode))
        weights = weights.astype(kept_ref.dtype)
        kept_ref[k] = _zeroed(weights, depth - k * size, 0) if ragged else weights

    @pl.when(k == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    x = refs["x"][...]
    if ragged:
        x = _zeroed(x, depth - k * size, 1)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    sum_ref[...] += jnp.dot(x, kept_ref[k], precision=precision, preferred_element_type=sum_ref.dtype)

    @pl.when(k == steps - 1)
    def _():
        total = sum_ref[...].astype(jnp.float32)
        if "row_scale" in refs:
            total = total * refs["row_scale"][...]
        if not grouped:
            total = total * (refs["scale"][...] * factor(decode))
        bias = refs["bias"][...] if "bias" in refs else None
        residual = refs["residual"][...] if "residual" in refs else None
        out_ref[...] = finish(total, bias, residual, activation).astype(out_ref.dtype)


def _zeroed(x: jax.Array, length: jax.Array, axis: int) -> jax.Array:
    """x with zeros where an axis is longer than the array: what is read there is anything."""
    inside = lax.broadcasted_iota(jnp.int32, x.shape, axis) < length
    return jnp.where(inside, x, jnp.zeros_like(x))
