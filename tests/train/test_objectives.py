"""Objectives against torch losses of the model's own logits; padding must not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llm_jax.config import ModelConfig
from llm_jax.models import describe
from llm_jax.ops.attention import FullContext
from llm_jax.sharding import make_mesh
from llm_jax.train.objectives import (
    classification_logits,
    classification_loss,
    lm_loss,
    masked_lm_loss,
)

SIZES = {
    "vocab_size": 31,
    "num_layers": 2,
    "embed_dim": 16,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 24,
    "max_positions": 16,
}


def bound(**settings):
    """A function that runs f(net, ...) inside jit on random parameters."""
    model = describe(ModelConfig("llama", **SIZES, **settings))
    mesh = make_mesh("data:1")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0.5, 0.3, s.shape).astype(s.dtype), model.shapes)

    def run(f, *args):
        with jax.set_mesh(mesh):
            return jax.jit(lambda p: f(model.bind(p), *args))(params)

    return run


def tokens(rows=3, length=9):
    rng = np.random.default_rng(0)
    lengths = np.array([length, length - 4, 2])[:rows]
    columns = np.arange(length)[None]
    real = columns < lengths[:, None]
    ids = np.where(real, rng.integers(0, SIZES["vocab_size"], (rows, length)), 0)
    return {
        "tokens": jnp.asarray(ids, jnp.int32),
        "segment_ids": jnp.asarray(real, jnp.int32),
        "positions": jnp.asarray(np.where(real, columns, 0), jnp.int32),
    }


def test_lm_loss_is_torchs_over_real_targets():
    run, batch = bound(), tokens()
    targets = jnp.where(batch["segment_ids"] > 0, jnp.roll(batch["tokens"], -1, axis=1), -1)
    batch |= {"targets": targets}

    def logits(net):
        context = FullContext(batch["segment_ids"])
        return net.unembed(net(batch["tokens"], batch["positions"], context)[0])

    scores = torch.tensor(np.asarray(run(logits))).reshape(-1, SIZES["vocab_size"])
    flat = torch.tensor(np.asarray(targets).reshape(-1), dtype=torch.long)
    expected = torch.nn.functional.cross_entropy(scores, flat, ignore_index=-1, reduction="sum")
    loss, count, metrics = run(lm_loss, batch, None)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    assert count == int((flat >= 0).sum())
    correct = int(((scores.argmax(-1) == flat) & (flat >= 0)).sum())
    assert (float(metrics["accuracy"][0]), float(metrics["accuracy"][1])) == (correct, count)


@pytest.mark.parametrize("weights", [(), (0.5, 2.0, 1.0, 3.0)])
def test_classification_loss_is_torchs_and_ignores_rows_of_padding(weights):
    run = bound(head="classifier", causal=False, pooling="mean", num_classes=4)
    batch = tokens() | {"labels": jnp.asarray([3, 0, 2], jnp.int32)}
    scores = torch.tensor(np.asarray(run(classification_logits, batch, None)))
    expected = torch.nn.functional.cross_entropy(
        scores,
        torch.tensor([3, 0, 2]),
        weight=torch.tensor(weights) if weights else None,
        reduction="mean",
    )
    if weights:
        batch["weights"] = jnp.asarray(weights, jnp.float32)[batch["labels"]]
    padded = {k: jnp.pad(v, ((0, 2),) + ((0, 0),) * (v.ndim - 1)) for k, v in batch.items()}
    padded["labels"] = padded["labels"].at[3:].set(-1)
    for rows in (batch, padded):
        loss, count, metrics = run(classification_loss, rows, None)
        np.testing.assert_allclose(loss / count, expected.item(), rtol=1e-5)
        assert float(metrics["accuracy"][1]) == 3.0


def test_dropout_acts_only_with_a_key():
    run = bound(head="classifier", causal=False, pooling="mean", num_classes=3, dropout=0.5)
    batch = tokens() | {"labels": jnp.asarray([0, 1, 2], jnp.int32)}
    keys = jax.random.split(jax.random.key(1), 2)
    plain, *dropped = run(
        lambda net: [
            classification_loss(net, batch, key)[0] for key in (None, keys[0], keys[0], keys[1])
        ]
    )
    assert dropped[0] == dropped[1] and len({float(x) for x in (plain, *dropped)}) == 3


class Recorder:
    """Stands for a network: keeps the tokens it is shown; its logits are drawn from a fixed table."""

    def __init__(self, vocab):
        self.scores = jnp.asarray(np.random.default_rng(1).normal(size=(64, vocab)), jnp.float32)

    def __call__(self, tokens, positions, context):
        self.shown = np.asarray(tokens)
        where = positions[..., None] + 16 * jnp.arange(len(tokens))[:, None, None]
        return where.astype(jnp.float32), context

    def unembed(self, hidden):
        return self.scores[hidden[..., 0].astype(jnp.int32) % 64]


def masked(rows, length, key, rate=0.15, vocab=1000, mask_id=1000):
    """(net, batch, result) of one call; the rows have 2 to `length` real tokens."""
    rng = np.random.default_rng(0)
    real = np.arange(length)[None] < rng.integers(2, length + 1, (rows, 1))
    ids = np.where(real, rng.integers(0, vocab, real.shape), 0)
    positions = np.where(real, np.arange(length), 0)
    batch = {"tokens": ids, "segment_ids": real, "positions": positions}
    batch = {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}
    net = Recorder(vocab)
    result = masked_lm_loss(net, batch, key, mask_id=mask_id, vocab_size=vocab, rate=rate)
    return net, batch, result


def test_masked_lm_hides_what_bert_hides():
    net, batch, (_, count, _) = masked(400, 60, jax.random.key(0))
    tokens, real = np.asarray(batch["tokens"]), np.asarray(batch["segment_ids"]) > 0
    wanted = np.maximum(np.round(0.15 * real.sum(1)), 1)
    assert float(count) == wanted.sum()
    hidden, changed = net.shown == 1000, net.shown != tokens
    assert not changed[~real].any()
    assert (changed.sum(1) <= wanted).all()
    # Binomial: 0.8 and 0.1 of about 1,900 targets, within four standard deviations
    assert abs(hidden.sum() / wanted.sum() - 0.8) < 4 * (0.16 / wanted.sum()) ** 0.5
    assert abs((changed & ~hidden).sum() / wanted.sum() - 0.1) < 4 * (0.09 / wanted.sum()) ** 0.5
    other = masked(400, 60, jax.random.key(1))[0].shown
    assert (other != net.shown).sum() > wanted.sum()


def test_masked_lm_loss_is_torchs_at_the_hidden_tokens():
    # rate 1: every token is a target, so that the expected sum is known
    net, batch, (loss, count, metrics) = masked(3, 16, jax.random.key(0), rate=0.999, vocab=50)
    real = np.asarray(batch["segment_ids"]) > 0
    where = np.arange(16)[None] + 16 * np.arange(3)[:, None]
    scores = torch.tensor(np.asarray(net.scores))[where[real] % 64]
    targets = torch.tensor(np.asarray(batch["tokens"])[real], dtype=torch.long)
    expected = torch.nn.functional.cross_entropy(scores, targets, reduction="sum")
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    assert float(count) == real.sum()
    assert float(metrics["accuracy"][0]) == int((scores.argmax(-1) == targets).sum())


def test_masked_lm_evaluation_hides_the_same_tokens_each_time():
    first, second = (masked(8, 20, None)[0].shown for _ in range(2))
    np.testing.assert_array_equal(first, second)
