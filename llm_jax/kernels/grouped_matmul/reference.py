"""What a grouped matrix product computes, in plain jax.numpy."""

import jax
import jax.numpy as jnp
from jax import lax


def reference_grouped_matmul(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, scale: jax.Array | None = None
) -> jax.Array:
    """out [M, N] in the dtype of x: out[i] = w[group of row i] x[i], 0 for rows of no group.

    x [M, K], w [E, N, K], group_sizes [E] integers, scale [E, N] or None: of the rows of w. Every row is
    multiplied by the weights of every group: E times the operations, but no gathered weights.
    """
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])

    def add(total, group):
        weights, start, end, scales = group
        exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        product = jnp.matmul(
            x, weights.astype(x.dtype).T, precision=exact, preferred_element_type=jnp.float32
        )
        inside = (row >= start) & (row < end)
        return total + jnp.where(inside[:, None], product * scales, 0.0), None

    zeros = jnp.zeros((x.shape[0], w.shape[1]), jnp.float32)
    scales = jnp.ones(w.shape[:2], jnp.float32) if scale is None else scale
    return lax.scan(add, zeros, (w, ends - group_sizes, ends, scales))[0].astype(x.dtype)
