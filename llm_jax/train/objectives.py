"""What a step minimises: (bound model, batch, key) -> (loss sum, count, metrics).

The loss of a batch is loss sum / count. Metrics are pairs (sum, count) with the same meaning. Sums
add up over parts of a batch, which is what makes accumulation equal to one large batch.
`key` drives dropout; None means evaluation. Bind options with `functools.partial`.

Letters: B batch, T tokens, C classes.
"""

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
    net: Transformer, batch: Batch, key: jax.Array | None, *, chunk: int = 0
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Next-token cross entropy over the targets (-1 = none), one count per target token.

    batch: tokens, targets, segment_ids, positions [B, T] int32. chunk: positions whose logits are
    held at a time, 0 = all (see `vocabulary_loss`).
    """
    context = FullContext(batch["segment_ids"], key)
    hidden, _ = net(batch["tokens"], batch["positions"], context)
    loss, count, correct = vocabulary_loss(net.unembed, hidden, batch["targets"], chunk=chunk)
    return loss, count, {"accuracy": (correct, count)}


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
