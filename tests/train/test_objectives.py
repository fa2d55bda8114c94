"""Objectives against torch losses of the model's own logits; padding must not count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llm_jax.config import ModelConfig
from llm_jax.models import describe
from llm_jax.ops.attention import FullContext
from llm_jax.sharding import make_mesh
from llm_jax.train.objectives import classification_logits, classification_loss, lm_loss

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
    padded = {k: jnp.pad(v, ((0, 2),) + ((0, 0),) * (v.ndim - 1)) for k, v in batch.items()}
    padded["labels"] = padded["labels"].at[3:].set(-1)
    objective = functools.partial(classification_loss, class_weights=weights)
    for rows in (batch, padded):
        loss, count, metrics = run(objective, rows, None)
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
