"""Cross entropy against torch; its chunked form against the whole, in values and in memory."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llm_jax.ops.linear import linear
from llm_jax.ops.losses import cross_entropy, top_hits, vocabulary_loss

CLASSES = 11


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(4, 7, CLASSES)) * 5).astype(np.float32)
    targets = rng.integers(0, CLASSES, (4, 7)).astype(np.int32)
    targets[rng.random((4, 7)) < 0.3] = -1
    return logits, targets


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.1)])
def test_loss_and_gradient_match_torch(batch, smoothing, z_loss):
    logits, targets = batch

    def loss(x):
        losses = cross_entropy(x, jnp.asarray(targets), label_smoothing=smoothing, z_loss=z_loss)
        return losses.sum()

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
    x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(
        x.reshape(-1, CLASSES),
        torch.tensor(targets.reshape(-1), dtype=torch.long),
        ignore_index=-1,
        label_smoothing=smoothing,
        reduction="sum",
    )
    expected = expected + z_loss * (x.logsumexp(-1) ** 2)[torch.tensor(targets) >= 0].sum()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, torch.autograd.grad(expected, x)[0], atol=1e-6)


def test_huge_logits_stay_finite_and_bfloat16_is_summed_in_float32():
    logits = jnp.asarray([[3e4, -3e4, 0.0]], jnp.bfloat16)
    loss = cross_entropy(logits, jnp.asarray([1]))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, [6e4], rtol=1e-2)


def test_a_hit_is_torchs_argmax_and_a_tie_half_of_one(batch):
    logits, targets = batch
    expected = (torch.tensor(logits).argmax(-1) == torch.tensor(targets)).float()
    np.testing.assert_array_equal(top_hits(jnp.asarray(logits), jnp.asarray(targets)), expected)
    tied = jnp.asarray([[2.0, 2.0, 1.0], [2.0, 2.0, 1.0], [2.0, 2.0, 1.0], [-1.0, -2.0, -3.0]])
    np.testing.assert_array_equal(top_hits(tied, jnp.asarray([0, 2, -1, 0])), [0.5, 0.0, 0.0, 1.0])


@pytest.mark.parametrize(("chunk", "z_loss"), [(1, 0.0), (3, 0.1), (7, 0.0), (100, 0.1)])
def test_chunks_give_the_loss_and_gradient_of_torch_and_of_the_whole(chunk, z_loss):
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(2, 7, 5)).astype(np.float32))
    table = jnp.asarray(rng.normal(size=(CLASSES, 5)).astype(np.float32))
    targets = jnp.asarray(rng.integers(-1, CLASSES, (2, 7)).astype(np.int32))

    def loss(table, hidden, chunk):
        unembed = lambda h: jnp.einsum("btd,vd->btv", h, table)  # noqa: E731
        total, count, correct = vocabulary_loss(unembed, hidden, targets, chunk=chunk, z_loss=z_loss)
        return total, (count, correct)

    whole = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(table, hidden, 0)
    parts = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(table, hidden, chunk)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)

    w, h = (torch.tensor(np.asarray(x), dtype=torch.float64).requires_grad_() for x in (table, hidden))
    t = torch.tensor(np.asarray(targets), dtype=torch.long)
    logits = (h @ w.T).reshape(-1, CLASSES)
    total = torch.nn.functional.cross_entropy(logits, t.reshape(-1), ignore_index=-1, reduction="sum")
    total = total + z_loss * (logits.logsumexp(-1) ** 2)[t.reshape(-1) >= 0].sum()
    total.backward()
    (value, (count, correct)), gradients = parts
    np.testing.assert_allclose(value, total.item(), rtol=1e-5)
    assert count == int((t >= 0).sum())
    assert correct == int((logits.argmax(-1) == t.reshape(-1)).sum())
    for ours, theirs in zip(gradients, (w.grad, h.grad), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_chunks_never_hold_all_logits():
    rows, length, width, vocabulary = 2, 256, 8, 50257
    shape = jax.ShapeDtypeStruct

    def compiled(chunk):
        def loss(table, hidden, targets):
            unembed = lambda h: linear(h, table)  # noqa: E731
            return vocabulary_loss(unembed, hidden, targets, chunk=chunk)[0]

        hidden, targets = shape((rows, length, width), jnp.float32), shape((rows, length), jnp.int32)
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
        return gradient.lower(shape((vocabulary, width), jnp.float32), hidden, targets).compile()

    def elements(program):
        """Of the largest array that the program names."""
        shapes = re.findall(r"[a-z]+[0-9]+\[([0-9,]+)\]", program.as_text())
        return max(math.prod(map(int, s.split(","))) for s in shapes)

    def temporary(program):
        """Bytes held besides arguments and results."""
        analysis = program.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    logits = rows * length * vocabulary
    assert elements(compiled(0)) >= logits
    assert temporary(compiled(0)) > 4 * logits
    parts = compiled(32)
    assert elements(parts) == rows * 32 * vocabulary
    # The logits of a chunk and their gradient: a quarter of all logits, which have 256 / 32 = 8 chunks.
    assert temporary(parts) < 1.2 * 4 * logits / 4
