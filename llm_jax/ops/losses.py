"""Cross entropy as (sum, count), so that parts of a batch add up to exactly the loss of the whole.

Letters: B batch, T tokens, D embed, V classes or vocabulary. Targets below 0 carry no loss.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array, *, label_smoothing: float = 0.0) -> jax.Array:
    """logits [..., V], targets [...] int32 -> -log p(target) of each [...], float32, 0 for no target.

    label_smoothing s mixes the target with the uniform distribution: 1 - s and s (Szegedy et al. 2016).
    The target is read by comparison, not by gather, so V may be split over devices.
    """
    logits = logits.astype(jnp.float32)
    classes = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    hit = jnp.sum(jnp.where(classes == targets[..., None], logits, 0.0), axis=-1)
    if label_smoothing:
        hit = (1.0 - label_smoothing) * hit + label_smoothing * jnp.mean(logits, axis=-1)
    loss = jax.nn.logsumexp(logits, axis=-1) - hit
    return jnp.where(targets >= 0, loss, 0.0)


def vocabulary_loss(
    unembed: Callable[[jax.Array], jax.Array], hidden: jax.Array, targets: jax.Array, *, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """hidden [B, T, D], targets [B, T] -> (loss sum, count, correct), each [] float32.

    unembed: [B, t, D] -> logits [B, t, V]. With chunk > 0 only the logits [B, chunk, V] of that many
    positions exist at a time; the backward pass computes them once more.
    """
    if chunk == 0 or chunk >= hidden.shape[1]:
        return _token_sums(unembed(hidden), targets)
    pad = -hidden.shape[1] % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, pad)), constant_values=-1)

    @jax.checkpoint
    def part(start):
        h = jax.lax.dynamic_slice_in_dim(hidden, start, chunk, axis=1)
        t = jax.lax.dynamic_slice_in_dim(targets, start, chunk, axis=1)
        return _token_sums(unembed(h), t)

    def add(sums, start):
        return jax.tree.map(jnp.add, sums, part(start)), None

    starts = jnp.arange(0, hidden.shape[1], chunk)
    return jax.lax.scan(add, (jnp.zeros(()),) * 3, starts)[0]


def _token_sums(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """logits [B, t, V], targets [B, t] -> (loss sum, count, correct)."""
    correct = jnp.argmax(logits, axis=-1).astype(targets.dtype) == targets
    loss = cross_entropy(logits, targets)
    return loss.sum(), jnp.sum(targets >= 0, dtype=jnp.float32), correct.sum(dtype=jnp.float32)
