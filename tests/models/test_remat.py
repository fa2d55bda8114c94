"""Rematerialization: the same gradient from less memory, in the order that the policies promise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.config import ModelConfig
from llm_jax.models import describe
from llm_jax.ops.attention import FullContext
from llm_jax.tree import flatten

CONFIG = ModelConfig(
    "llama",
    vocab_size=32,
    num_layers=4,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    max_positions=128,
    windows=(8, 0, 8, 0),
    dropout=0.1,
)
POLICIES = ("none", "dots", "dots_no_batch", "full")


@pytest.fixture(scope="module")
def runs():
    """{policy: (gradient, temporary bytes)} of a loss with dropout, which must be drawn twice alike."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 32, (2, 128)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(128), (2, 128))
    context = FullContext(jnp.ones_like(tokens), jax.random.key(3))

    def run(policy):
        model = describe(dataclasses.replace(CONFIG, remat=policy))
        seeded = np.random.default_rng(1)
        params = jax.tree.map(
            lambda s: jnp.asarray(seeded.normal(0.5, 0.2, s.shape), s.dtype), model.shapes
        )

        def loss(params):
            net = model.bind(params)
            return jnp.sum(jnp.square(net.unembed(net(tokens, positions, context)[0])))

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return compiled(params), analysis.temp_size_in_bytes

    return {policy: run(policy) for policy in POLICIES}


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_the_gradient_is_the_same(runs, policy):
    ours, expected = flatten(runs[policy][0]), flatten(runs["none"][0])
    for path, gradient in expected.items():
        # The same operations, which the compiler may fuse, and so round, in another way.
        scale = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(ours[path], gradient, rtol=1e-5, atol=1e-5 * scale, err_msg=path)


def test_each_policy_needs_less_memory_than_the_one_before(runs):
    held = [runs[policy][1] for policy in POLICIES]
    assert held == sorted(held, reverse=True)
    # Of 3 layers at least: softmax and masks, then the scores [B, N, T, T], then products with weights.
    scores = 2 * 4 * 128 * 128 * 4
    assert held[0] - held[1] > 3 * scores
    assert held[1] - held[2] > 3 * scores
    products = 2 * 128 * (2 * 64 + 4 * 8 + 2 * 2 * 8) * 4  # gate and up, queries, keys and values
    assert held[2] - held[3] > 3 * products


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="remat='dot'.*did you mean dots"):
        dataclasses.replace(CONFIG, remat="dot")
