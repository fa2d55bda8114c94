"""Which blocks of a mask are hidden, whole or touched: what the kernel skips, computes or masks.

Letters: B batch, T queries, S keys, I and J blocks of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llm_jax.kernels.flash_attention.tpu import DIAGONAL, MASKED, SKIP, WHOLE, Blocks, Reach

Plan = tuple[jax.Array | np.ndarray, frozenset[int]]  # kinds, those that occur


def plan_by_index(queries: int, keys: int, offset: int, reach: Reach, blocks: Blocks) -> Plan:
    """The plan of one sequence whose query t is at place t + offset of its keys; known before it runs.

    kinds int32 [1, I, J], and those that occur. Unless all is seen, offset and block_q are multiples of
    block_k.
    """
    bq, bk = blocks.block_q, blocks.block_k
    first = np.arange(queries // bq)[:, None] * bq + offset
    ahead = np.arange(keys // bk)[None] * bk - first  # of a block's first key before its first query
    least, most = -ahead - (bk - 1), bq - 1 - ahead  # from a key to a query
    hidden = (most < reach[0]) | (least > reach[1])
    whole = (least >= reach[0]) & (most <= reach[1])
    touched = ~hidden & ~whole
    assert not touched.any() or (bq % bk == 0 and offset % bk == 0), (blocks, offset)
    kinds = np.where(hidden, SKIP, np.where(whole, WHOLE, DIAGONAL + ahead // bk)).astype(np.int32)
    return kinds[None], frozenset(np.unique(kinds).tolist())


def plan_by_ids(
    of_queries: jax.Array, of_keys: jax.Array, causal: bool, window: int, blocks: Blocks
) -> Plan:
    """The plan of rows whose mask follows from positions and segments, made on the device.

    of_queries [B, 2, T], of_keys [B, S, 2] int32, as `tpu.flash_forward` takes them -> kinds, fetch
    int32 [B, I, J]. A block is judged by its smallest and largest positions and segments: one that is
    hidden in truth may be called MASKED, never the other way round.
    """
    q = of_queries.reshape(of_queries.shape[0], 2, -1, blocks.block_q)
    k = of_keys.transpose(0, 2, 1).reshape(of_keys.shape[0], 2, -1, blocks.block_k)
    (q_low, q_segment_low), (q_high, q_segment_high) = (
        tuple(f(q, axis=-1)[:, n, :, None] for n in (0, 1)) for f in (jnp.min, jnp.max)
    )
    (k_low, k_segment_low), (k_high, k_segment_high) = (
        tuple(f(k, axis=-1)[:, n, None, :] for n in (0, 1)) for f in (jnp.min, jnp.max)
    )
    hidden = (k_segment_low > q_segment_high) | (k_segment_high < q_segment_low)
    one = (q_segment_low == q_segment_high) & (k_segment_low == k_segment_high)
    whole = one & (q_segment_low == k_segment_low)
    if causal:
        hidden |= k_low > q_high
        whole &= k_high <= q_low
    if window:
        hidden |= (q_low - k_high >= window) | (k_low - q_high >= window)
        whole &= (q_high - k_low < window) & (k_high - q_low < window)
    kinds = jnp.where(hidden, SKIP, jnp.where(whole, WHOLE, MASKED)).astype(jnp.int32)
    return kinds, frozenset((SKIP, WHOLE, MASKED))


def fetched(kinds: jax.Array) -> jax.Array:
    """kinds [B, X, Y] -> int32 [B, X, Y]: which block along y should have been fetched by each step.

    Its own, or the last one that counted; before the first that counts that one, so that nothing is
    fetched for nothing.
    """
    places = jnp.arange(kinds.shape[-1], dtype=jnp.int32)
    counted = jnp.where(kinds != SKIP, jnp.broadcast_to(places, kinds.shape), -1)
    last = lax.cummax(counted, axis=kinds.ndim - 1)
    first = jnp.argmax(kinds != SKIP, axis=-1).astype(jnp.int32)[..., None]
    return jnp.where(last < 0, first, last)
