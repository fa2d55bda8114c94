"""Two programs to try the laboratory on: a tiled matrix product in Pallas, and XLA's own."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm_jax.tpu.case import Case


def _product(x_ref, y_ref, out_ref, sum_ref):
    """One step of the grid (rows, columns, inner): adds x [bm, bk] times y [bk, bn] to the sum."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def tiled_matmul(x: jax.Array, y: jax.Array, *, bm: int, bk: int, bn: int, interpret=False) -> jax.Array:
    """x [M, K] times y [K, N], in blocks that divide the axes; interpret: see `pl.pallas_call`."""
    (m, k), n = x.shape, y.shape[1]
    return pl.pallas_call(
        _product,
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        grid=(m // bm, n // bn, k // bk),
        in_specs=[
            pl.BlockSpec((bm, bk), lambda i, j, l: (i, l)),
            pl.BlockSpec((bk, bn), lambda i, j, l: (l, j)),
        ],
        out_specs=pl.BlockSpec((bm, bn), lambda i, j, l: (i, j)),
        scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=60 << 20
        ),
        interpret=interpret,
        name="tiled_matmul",
    )(x, y)


def matmul(size: int = 4096, bm: int = 512, bk: int = 1024, bn: int = 1024) -> Case:
    """A product of two [size, size] bfloat16 matrices in tiles."""
    x = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    function = functools.partial(tiled_matmul, bm=bm, bk=bk, bn=bn)
    return Case(function, (x, x), flops=2 * size**3, hbm_bytes=3 * 2 * size**2)


def xla_matmul(size: int = 4096) -> Case:
    """The same by XLA."""
    x = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    return Case(jnp.dot, (x, x), flops=2 * size**3, hbm_bytes=3 * 2 * size**2)
