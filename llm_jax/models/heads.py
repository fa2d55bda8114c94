"""What is read off the hidden states: vocabulary, class and span logits, sentence vectors.

Letters: B batch, T tokens, D embed, V vocab, C classes.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.config import ModelConfig
from llm_jax.models.layers import ACTIVATIONS, Norm, add_bias, vector, weight
from llm_jax.ops.attention import AttentionContext
from llm_jax.ops.linear import linear

# Where their parameters are; the rest is the trunk
HEADS = ("lm_head", "classifier", "ngram_logits", "pooler", "span")


def pool(hidden: jax.Array, mask: jax.Array, kind: str) -> jax.Array:
    """hidden [B, T, D], mask [B, T] (0 = padding) -> one vector a row [B, D].

    cls: the first real token; last: the last real token; mean: over the real tokens (float32);
    max: of each feature, over the real tokens.
    """
    real = mask > 0
    if kind == "max":
        lowest = jnp.finfo(hidden.dtype).min
        return jnp.where(real[:, :, None], hidden, lowest).max(axis=1)
    if kind == "mean":
        weights = real.astype(jnp.float32)
        total = jnp.einsum("btd,bt->bd", hidden.astype(jnp.float32), weights)
        count = jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)
        return (total / count).astype(hidden.dtype)
    steps = jnp.arange(mask.shape[1])
    if kind == "cls":
        index = jnp.argmax(real, axis=1)
    else:
        index = jnp.argmax(jnp.where(real, steps[None], -1), axis=1)
    return jnp.take_along_axis(hidden, index[:, None, None], axis=1)[:, 0]


class LMHead(nnx.Module):
    """Logits over the vocabulary; `transform` is BERT's dense + activation + norm before them."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        d, v = cfg.embed_dim, cfg.vocab_size
        tied, masked = cfg.tie_embeddings, cfg.head == "masked_lm"
        self.softcap = cfg.final_softcap
        self.activation = ACTIVATIONS[cfg.activation]
        self.weight = None if tied else weight(rngs, (v, d), ("vocab", "embed"), ("embed",))
        self.bias = vector(0.0, (v,), ("vocab",)) if masked else None
        square = ("embed_out", "embed")
        self.transform = weight(rngs, (d, d), square, ("embed",)) if masked else None
        self.transform_bias = vector(0.0, (d,), ("embed",)) if masked else None
        self.transform_norm = Norm(cfg, d, "embed") if masked else None

    def __call__(self, hidden: jax.Array, embedding: nnx.Param) -> jax.Array:
        """hidden [..., D], embedding [V, D] (used when tied) -> logits [..., V] float32."""
        if self.transform is not None and self.transform_norm is not None:
            hidden = add_bias(linear(hidden, self.transform), self.transform_bias)
            hidden = self.transform_norm(self.activation(hidden))
        table = embedding if self.weight is None else self.weight
        logits = add_bias(linear(hidden, table), self.bias).astype(jnp.float32)
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)


class Pooler(nnx.Module):
    """tanh(dense(x)) on the pooled vector (BERT)."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        d = cfg.embed_dim
        self.weight = weight(rngs, (d, d), ("embed_out", "embed"), ("embed",))
        self.bias = vector(0.0, (d,), ("embed",))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, D] -> [B, D]."""
        return jnp.tanh(add_bias(linear(x, self.weight), self.bias))


class ClassifierHead(nnx.Module):
    """Logits of the classes, or of their parts; decoders of Hugging Face have no bias there."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        c, d = sum(cfg.class_parts) or cfg.num_classes, cfg.embed_dim
        self.weight = weight(rngs, (c, d), ("classes", "embed"), ("embed",))
        self.bias = None if cfg.causal else vector(0.0, (c,), ("classes",))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, D] -> logits [B, C] float32; with `class_parts` [B, P], P = their sum."""
        return add_bias(linear(x, self.weight), self.bias).astype(jnp.float32)


def fold_parts(logits: jax.Array, parts: tuple[int, ...]) -> jax.Array:
    """Logits [B, P] of the parts of classes, class after class -> [B, C] of the classes.

    A class is as probable as its parts together, so its logit is the logarithm of their summed
    exponentials. parts: how many each class has, () = each is one.
    """
    if not parts:
        return logits
    ends = list(itertools.accumulate(parts))
    each = [logits[:, end - n : end] for n, end in zip(parts, ends, strict=True)]
    return jnp.stack([jax.nn.logsumexp(x, axis=-1) for x in each], axis=-1)


class NgramLogits(nnx.Module):
    """Logits of the classes straight from a text's n-grams, a path beside that from the hidden states.

    The wide part of a wide and deep model (Cheng et al. 2016): linear in which n-grams a text has.
    """

    GAIN = 20.0  # a row is in few batches, and an optimizer such as Adam moves it by its rate in each

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        del rngs  # nothing is random: no n-gram tells anything yet
        self.rate = cfg.ngram_dropout
        shape = (len(cfg.ngram_orders) * cfg.ngram_buckets, sum(cfg.class_parts) or cfg.num_classes)
        self.table = vector(0.0, shape, ("ngrams", "classes"))

    def __call__(self, ngrams: jax.Array, context: AttentionContext) -> jax.Array:
        """Rows of the table [B, N] int32, negative = none -> logits [B, P] float32.

        The sum over a text's n-grams, divided by the root of their number: a text is a vector of length
        1, as TF-IDF has it. P: parts of the classes.
        """
        there = (ngrams >= 0).astype(jnp.float32)
        number = jnp.maximum(there.sum(axis=1, keepdims=True), 1.0)
        kept = context.dropout(there, self.rate, 0, 4)
        table = self.table.get_value().astype(jnp.float32)
        total = jnp.einsum("bnp,bn->bp", table[jnp.maximum(ngrams, 0)], kept)
        return self.GAIN * total / jnp.sqrt(number)


class SpanHead(nnx.Module):
    """Logits of each token to be the first, and the last, of an answer (Devlin et al. 2019, 4.2)."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.weight = weight(rngs, (2, cfg.embed_dim), ("classes", "embed"), ("embed",))
        self.bias = vector(0.0, (2,), ("classes",))

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """hidden [B, T, D] -> logits [B, T, 2] float32: start, end."""
        return add_bias(linear(hidden, self.weight), self.bias).astype(jnp.float32)
