"""What a step minimises: (bound model, batch, key) -> (loss sum, count, metrics).

The loss of a batch is loss sum / count. Metrics are pairs (sum, count) with the same meaning. Sums
add up over parts of a batch, which is what makes accumulation equal to one large batch.
`key` drives dropout; None means evaluation. Bind options with `functools.partial`.

Letters: B batch, T tokens, C classes.
"""

import math
from typing import Protocol

import jax
import jax.numpy as jnp

from llm_jax.models.transformer import Transformer
from llm_jax.ops.attention import FullContext
from llm_jax.ops.losses import cross_entropy, vocabulary_loss

Batch = dict[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]


class Objective(Protocol):
    """The shape of an objective."""

    def __call__(
        self, net: Transformer, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, Metrics]: ...


def lm_loss(
    net: Transformer, batch: Batch, key: jax.Array | None, *, chunk: int = 0, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Next-token cross entropy over the targets (-1 = none), one count per target token.

    batch: tokens, targets, segment_ids, positions [B, T] int32. chunk: positions whose logits are
    held at a time, 0 = all (see `vocabulary_loss`). z_loss: see `cross_entropy`.
    """
    context = FullContext(batch["segment_ids"], key)
    hidden, _ = net(batch["tokens"], batch["positions"], context)
    loss, count, correct = vocabulary_loss(
        net.unembed, hidden, batch["targets"], chunk=chunk, z_loss=z_loss
    )
    return loss, count, {"accuracy": (correct, count)}


def masked_lm_loss(
    net: Transformer,
    batch: Batch,
    key: jax.Array | None,
    *,
    mask_id: int,
    vocab_size: int,
    rate: float = 0.15,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Cross entropy of hidden tokens given the others (BERT, Devlin et al. 2019).

    batch: tokens, segment_ids, positions [B, T] int32. In each row `rate` of the real tokens, but one at
    least, are targets; of these 80% become `mask_id`, 10% a random token of `vocab_size`, 10% stay. Only
    the targets' logits are computed. Evaluation (key None) hides the same tokens every time.
    """
    tokens, real = batch["tokens"], batch["segment_ids"] > 0
    hide, kind, other = jax.random.split(jax.random.key(0) if key is None else key, 3)
    places, chosen = _masked_places(hide, real, rate)
    targets = jnp.take_along_axis(tokens, places, axis=1)
    draw = jax.random.uniform(kind, places.shape)
    random = jax.random.randint(other, places.shape, 0, vocab_size, tokens.dtype)
    shown = jnp.where(draw < 0.8, mask_id, jnp.where(draw < 0.9, random, targets))
    shown = jnp.where(chosen, shown, targets).astype(tokens.dtype)
    rows = jnp.arange(len(tokens))[:, None]
    context = FullContext(batch["segment_ids"], key)
    hidden, _ = net(tokens.at[rows, places].set(shown), batch["positions"], context)
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
    targets = jnp.where(chosen, targets, -1)
    loss, count, correct = vocabulary_loss(net.unembed, hidden, targets, chunk=0)
    return loss, count, {"accuracy": (correct, count)}


def _masked_places(key: jax.Array, real: jax.Array, rate: float) -> tuple[jax.Array, jax.Array]:
    """real [B, T] bool -> places [B, K] int32, a random set of real tokens first; which count [B, K].

    K = ceil(rate T). A row of n > 0 real tokens has max(1, round(rate n)) places that count.
    """
    scores = jnp.where(real, jax.random.uniform(key, real.shape), -1.0)
    most = math.ceil(rate * real.shape[1])
    places = jax.lax.top_k(scores, most)[1]
    number = real.sum(axis=1, keepdims=True, dtype=jnp.float32)
    wanted = jnp.minimum(jnp.maximum(jnp.round(rate * number), 1.0), number)
    return places, jnp.arange(most, dtype=jnp.float32)[None] < wanted


def classification_loss(
    net: Transformer,
    batch: Batch,
    key: jax.Array | None,
    *,
    label_smoothing: float = 0.0,
    class_weights: tuple[float, ...] = (),
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Cross entropy of each row's label, the mean weighted by the weight of its class.

    batch: tokens, segment_ids, positions [B, T] int32 and labels [B] int32 (-1 = a row of padding).
    class_weights: one for each of the C classes, () = all 1.
    """
    logits = classification_logits(net, batch, key)
    labels = batch["labels"]
    rows = (labels >= 0).astype(jnp.float32)
    weights = rows
    if class_weights:
        weights = rows * jnp.asarray(class_weights, jnp.float32)[jnp.maximum(labels, 0)]
    loss = cross_entropy(logits, labels, label_smoothing=label_smoothing)
    correct = (jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels).astype(jnp.float32)
    return jnp.sum(loss * weights), weights.sum(), {"accuracy": (correct.sum(), rows.sum())}


def classification_logits(net: Transformer, batch: Batch, key: jax.Array | None) -> jax.Array:
    """Class logits [B, C] float32 of a batch (tokens, segment_ids, positions [B, T])."""
    context = FullContext(batch["segment_ids"], key)
    hidden, context = net(batch["tokens"], batch["positions"], context)
    return net.classify(hidden, batch["segment_ids"], context)
