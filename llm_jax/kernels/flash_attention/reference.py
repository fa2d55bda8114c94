"""What flash attention computes, in plain jax.numpy."""

import jax
import jax.numpy as jnp


def reference_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """(output [B, T, N, H], log of the sums of exponentials [B, N, T]), both in the dtype of q.

    q [B, T, N, H], k and v [B, K, S, H], mask [B or 1, T, S] bool, True = visible; query head n reads
    key head n // (N / K). A query that sees nothing has output 0 and -inf. softcap: 0 = none.
    """
    kv_heads, heads = k.shape[1], q.shape[2]
    grouped = q.reshape(*q.shape[:2], kv_heads, heads // kv_heads, q.shape[3])
    scores = jnp.einsum("btkgh,bksh->bkgts", grouped, k, precision="highest") * scale
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    weights = jnp.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("bkgts,bksh->btkgh", weights, v, precision="highest")
    share = jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)
    out = out * share[..., 0].transpose(0, 3, 1, 2)[..., None]
    return out.reshape(q.shape), (peak + jnp.log(total))[..., 0].reshape(q.shape[0], heads, -1)
