"""The grouped product as a loop over blocks of rows of one group, in plain XLA, for CPUs.

Letters: M rows, E groups, K columns of the rows, N columns of the result, R rows of a block.

XLA has one product for groups, `ragged_dot`, which on a CPU multiplies all rows by the matrices of all
groups: E times the work. Here a block has rows of one group, whose matrix alone is read. Blocks go in
the order of the groups and begin where theirs does; rows after its end are written again by the next.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LEAST_ROWS, MOST_ROWS = 8, 128  # of a block: fewer cost as much; more are padding where groups are small


class _Blocks(NamedTuple):
    """Of each block that there can be: its group, its first row and how many it has; and the number of
    those that there are.
    """

    group: jax.Array
    first: jax.Array
    rows: jax.Array
    count: jax.Array


def loop_matmul(
    x: jax.Array, w: jax.Array, sizes: jax.Array, scale: jax.Array | None, first: jax.Array | int
) -> jax.Array:
    """x [M, K], w [W, N, K], sizes [E] int32, scale None or [E, N] -> [M, N] in the dtype of x.

    first: which of the W matrices is group 0's. Differentiable in x and w.
    """
    out = _product(x, w, sizes, jnp.asarray(first, jnp.int32))
    ends, row = jnp.cumsum(sizes), jnp.arange(x.shape[0])
    if scale is not None:
        group = jnp.searchsorted(ends, row, side="right")
        out *= jnp.take(scale, group, axis=0, mode="clip")
    return jnp.where((row < ends[-1])[:, None], out, 0.0).astype(x.dtype)


def block_rows(rows: int, groups: int) -> int:
    """Rows of a block: a power of two, about twice what a group has on average; 1 where most have none.

    Every block reads (and XLA:CPU copies) its matrix, so that a group should be one block or few.
    """
    if rows < groups:
        return 1
    return min(MOST_ROWS, max(LEAST_ROWS, 1 << (2 * rows // groups - 1).bit_length()))


def _blocks(sizes: jax.Array, rows: int, size: int) -> _Blocks:
    """Blocks of `size` rows for groups of these sizes."""
    groups = sizes.shape[0]
    counts = -(-sizes // size)
    ends, starts = jnp.cumsum(counts), jnp.cumsum(sizes) - sizes
    block = jnp.arange(rows // size + groups)
    group = jnp.minimum(jnp.searchsorted(ends, block, side="right"), groups - 1).astype(jnp.int32)
    before = (block - (ends - counts)[group]) * size
    first = jnp.minimum(starts[group] + before, rows)
    own = jnp.minimum(sizes[group] - before, rows - first)
    return _Blocks(group, first, jnp.clip(own, 0, size), ends[-1])


@jax.custom_vjp
def _product(x, w, sizes, first):
    """[M, N] float32; rows of no group have any value."""
    return _rows_by_matrices(x, w, sizes, first, 1)


def _forward(x, w, sizes, first):
    return _product(x, w, sizes, first), (x, w, sizes, first)


def _backward(saved, grad):
    x, w, sizes, first = saved
    grad = grad.astype(x.dtype)
    of_x = _rows_by_matrices(grad, w, sizes, first, 0)
    inside = jnp.arange(x.shape[0]) < jnp.sum(sizes)
    of_x = jnp.where(inside[:, None], of_x, 0.0).astype(x.dtype)
    return of_x, _rows_by_rows(grad, x, w, sizes, first) if w.dtype == x.dtype else None, None, None


_product.defvjp(_forward, _backward)


def _rows_by_matrices(x, w, sizes, first, axis: int) -> jax.Array:
    """x [M, ...] times the matrix of each row's group, summed over this axis of it, float32."""
    rows, size = x.shape[0], block_rows(x.shape[0], sizes.shape[0])
    blocks, x = _blocks(sizes, rows, size), jnp.pad(x, ((0, size), (0, 0)))

    def one(i, out):
        part = jax.lax.dynamic_slice_in_dim(x, blocks.first[i], size)
        matrix = jax.lax.dynamic_index_in_dim(w, first + blocks.group[i], keepdims=False)
        value = _dot(part, matrix.astype(x.dtype), 1, axis)
        return jax.lax.dynamic_update_slice_in_dim(out, value, blocks.first[i], 0)

    out = jnp.zeros((rows + size, w.shape[2 - axis]), jnp.float32)
    return jax.lax.fori_loop(0, blocks.count, one, out)[:rows]


def _rows_by_rows(grad, x, w, sizes, first) -> jax.Array:
    """The gradient of w: each group's sum of outer products of its rows of grad [M, N] and x [M, K]."""
    rows, size = x.shape[0], block_rows(x.shape[0], sizes.shape[0])
    blocks = _blocks(sizes, rows, size)
    arrays = [jnp.pad(a, ((0, size), (0, 0))) for a in (grad, x)]

    def one(i, total):
        own = (jnp.arange(size) < blocks.rows[i])[:, None]  # the rest is the next group's
        parts = (jax.lax.dynamic_slice_in_dim(a, blocks.first[i], size) for a in arrays)
        left, right = (jnp.where(own, part, 0) for part in parts)
        at = first + blocks.group[i]
        value = jax.lax.dynamic_index_in_dim(total, at) + _dot(left, right, 0, 0)[None]
        return jax.lax.dynamic_update_slice_in_dim(total, value, at, 0)

    total = jnp.zeros(w.shape, jnp.float32)
    return jax.lax.fori_loop(0, blocks.count, one, total).astype(w.dtype)


def _dot(x, y, of_x: int, of_y: int) -> jax.Array:
    """The sum over these axes, in float32."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = (((of_x,), (of_y,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=exact, preferred_element_type=jnp.float32)
