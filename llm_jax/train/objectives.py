"""What a step minimises: (bound model, batch, key) -> (loss sum, count, metrics).

The loss of a batch is loss sum / count. Metrics are pairs (sum, count) with the same meaning. Sums
add up over parts of a batch, which is what makes accumulation equal to one large batch.
`key` drives dropout; None means evaluation. Bind options with `functools.partial`.

Letters: B batch, T tokens, C classes.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.models.heads import fold_parts
from llm_jax.models.transformer import Transformer
from llm_jax.ops.attention import FullContext
from llm_jax.ops.experts import load_balancing_loss, no_routing
from llm_jax.ops.losses import cross_entropy, vocabulary_loss
from llm_jax.sharding import balanced

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
    if net.cfg.causal:  # what it sees goes by positions, and the sum has no order
        names = ("tokens", "targets", "segment_ids", "positions")
        batch = {name: balanced(batch[name]) for name in names}
    hidden, context = net(batch["tokens"], batch["positions"], text_context(net, batch, key))
    loss, count, correct = vocabulary_loss(
        net.unembed, hidden, batch["targets"], chunk=chunk, z_loss=z_loss
    )
    balance, metrics = router_loss(net, context, count)
    return loss + balance, count, {"accuracy": (correct, count)} | metrics


def text_context(net: Transformer, batch: Batch, key: jax.Array | None) -> FullContext:
    """The context of a batch; it counts how tokens choose among experts, if the model has any."""
    cfg, segments = net.cfg, batch["segment_ids"]
    routing = no_routing(len(segments), cfg.num_experts) if cfg.num_experts else None
    return FullContext(segments, key, routing)


def router_loss(
    net: Transformer, context: FullContext, count: jax.Array
) -> tuple[jax.Array | float, Metrics]:
    """What a loss sum over `count` targets has added for the balance of experts, and that balance.

    Added while training only: an evaluation tells how well a model predicts. The balance is that of a
    part of the batch (`load_balancing_loss`), so here alone parts do not add up to one large batch.
    """
    if context.routing is None:
        return 0.0, {}
    tokens = jnp.sum(context.segment_ids > 0, dtype=jnp.float32)
    balance = count * load_balancing_loss(context.routing, tokens, net.cfg.num_layers)
    added = 0.0 if context.dropout_key is None else net.cfg.router_aux_loss * balance
    return added, {"router_balance": (balance, count)}


def masked_lm_loss(
    net: Transformer,
    batch: Batch,
    key: jax.Array | None,
    *,
    mask_id: int,
    vocab_size: int,
    rate: float = 0.15,
    spared: tuple[int, ...] = (),
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Cross entropy of hidden tokens given the others (BERT, Devlin et al. 2019).

    batch: tokens, segment_ids, positions [B, T] int32. In each row `rate` of the real tokens, but one at
    least, are targets; of these 80% become `mask_id`, 10% a random token of `vocab_size`, 10% stay. Only
    the targets' logits are computed. Evaluation (key None) hides the same tokens every time.
    spared: ids that are never hidden, and not counted, such as those of special tokens.
    """
    tokens, real = batch["tokens"], batch["segment_ids"] > 0
    if spared:
        real &= ~jnp.isin(tokens, jnp.asarray(spared, tokens.dtype))
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
    r_drop: float = 0.0,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Cross entropy of each row's label, the mean weighted by the rows' weights.

    batch: tokens, segment_ids, positions [B, T] int32; labels [B] int32, of the model's `class_parts`
    where it has them (-1 = a row of padding); weights [B] float32, without which all rows weigh 1;
    ngrams [B, N] int32 for a model with `ngram_orders`.
    r_drop: while training, every row is seen twice, and so many times the divergence of the two
    answers is added to their mean loss (R-Drop, Liang et al. 2021, whose alpha is twice this).

    A model with n-grams has two paths to its logits, and the loss is a sum: the encoder learns by its
    own loss and by that of the answer, the mean of both; the n-grams by their own cross entropy alone.
    By the answer's loss either path would learn only what the other lacks, and label smoothing and
    R-Drop, which an encoder needs, make a linear model worse (docs/results.md).
    """
    labels, parts = batch["labels"], net.cfg.class_parts
    rows = (labels >= 0).astype(jnp.float32)
    weights = rows * batch["weights"] if "weights" in batch else rows
    keys = jax.random.split(key) if r_drop and key is not None else [key]
    passes = [_part_logits(net, batch, key) for key in keys]

    def regularized(answers: Sequence[jax.Array]) -> jax.Array:
        losses = [cross_entropy(x, labels, label_smoothing=label_smoothing) for x in answers]
        mean = sum(losses[1:], losses[0]) / len(losses)
        return mean + r_drop * _disagreement(*answers) if len(answers) == 2 else mean

    loss = regularized([encoder for encoder, *_ in passes])
    if net.ngram_logits is not None:
        given = [(encoder, jax.lax.stop_gradient(ngrams)) for encoder, ngrams in passes]
        loss += regularized([_mean(paths) for paths in given])
        loss += cross_entropy(passes[0][1], labels)
    if parts:
        classes = np.repeat(np.arange(len(parts), dtype=np.int32), parts)
        labels = jnp.asarray(classes)[jnp.maximum(labels, 0)]
    chosen = jnp.argmax(fold_parts(_mean(passes[0]), parts), axis=-1).astype(labels.dtype)
    correct = jnp.sum((chosen == labels).astype(jnp.float32) * rows)
    return jnp.sum(loss * weights), weights.sum(), {"accuracy": (correct, rows.sum())}


def classification_logits(net: Transformer, batch: Batch, key: jax.Array | None) -> jax.Array:
    """Class logits [B, C] float32 of a batch: tokens, segment_ids, positions [B, T], perhaps ngrams."""
    return fold_parts(_mean(_part_logits(net, batch, key)), net.cfg.class_parts)


def _part_logits(net: Transformer, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, ...]:
    """Logits [B, P] of each path."""
    context = FullContext(batch["segment_ids"], key)
    hidden, context = net(batch["tokens"], batch["positions"], context)
    return net.classify_parts(hidden, batch["segment_ids"], context, batch.get("ngrams"))


def _mean(paths: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack(paths).mean(axis=0)


def _disagreement(a: jax.Array, b: jax.Array) -> jax.Array:
    """Logits [B, C] twice -> the mean of KL(a || b) and KL(b || a), [B] float32."""
    p, q = jax.nn.log_softmax(a, axis=-1), jax.nn.log_softmax(b, axis=-1)
    return 0.5 * jnp.sum((jnp.exp(p) - jnp.exp(q)) * (p - q), axis=-1)
