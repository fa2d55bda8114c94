"""Cross entropy against torch, and its chunked form against the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llm_jax.ops.losses import cross_entropy, vocabulary_loss

CLASSES = 11


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(4, 7, CLASSES)) * 5).astype(np.float32)
    targets = rng.integers(0, CLASSES, (4, 7)).astype(np.int32)
    targets[rng.random((4, 7)) < 0.3] = -1
    return logits, targets


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradient_match_torch(batch, smoothing):
    logits, targets = batch

    def loss(x):
        return cross_entropy(x, jnp.asarray(targets), label_smoothing=smoothing).sum()

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
    x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(
        x.reshape(-1, CLASSES),
        torch.tensor(targets.reshape(-1), dtype=torch.long),
        ignore_index=-1,
        label_smoothing=smoothing,
        reduction="sum",
    )
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, x.grad.numpy(), atol=1e-6)


def test_huge_logits_stay_finite_and_bfloat16_is_summed_in_float32():
    logits = jnp.asarray([[3e4, -3e4, 0.0]], jnp.bfloat16)
    loss = cross_entropy(logits, jnp.asarray([1]))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, [6e4], rtol=1e-2)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_give_the_loss_and_gradient_of_the_whole(chunk):
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(2, 7, 5)).astype(np.float32))
    table = jnp.asarray(rng.normal(size=(CLASSES, 5)).astype(np.float32))
    targets = jnp.asarray(rng.integers(-1, CLASSES, (2, 7)).astype(np.int32))

    def loss(table, hidden, chunk):
        unembed = lambda h: jnp.einsum("btd,vd->btv", h, table)  # noqa: E731
        total, count, correct = vocabulary_loss(unembed, hidden, targets, chunk=chunk)
        return total, (count, correct)

    whole = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(table, hidden, 0)
    parts = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(table, hidden, chunk)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)
    assert whole[0][1][0] == int(np.sum(np.asarray(targets) >= 0))
