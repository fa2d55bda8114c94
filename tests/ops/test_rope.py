"""Rotary embedding against transformers' frequencies and a rotation written with complex numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.config import RopeScaling
from llm_jax.ops.rope import apply_rope, frequencies, rotary_tables

LLAMA31 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

CASES = [  # head_dim, rope_parameters of transformers, ours
    (64, {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, RopeScaling("linear", 8.0)),
    (
        128,
        {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, **LLAMA31},
        RopeScaling("llama3", 8.0, original_max_positions=8192),
    ),
    (
        64,
        {"rope_type": "llama3", "factor": 32.0, "rope_theta": 5e5, **LLAMA31},
        RopeScaling("llama3", 32.0, original_max_positions=8192),
    ),
    (
        128,
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e6,
            "original_max_position_embeddings": 32768,
        },
        RopeScaling("yarn", 4.0, original_max_positions=32768),
    ),
    (
        64,
        {
            "rope_type": "yarn",
            "factor": 16.0,
            "rope_theta": 1e4,
            "beta_fast": 20.0,
            "beta_slow": 2.0,
            "attention_factor": 1.1,
            "original_max_position_embeddings": 512,
        },
        RopeScaling(
            "yarn", 16.0, original_max_positions=512, beta_fast=20.0, beta_slow=2.0, attention_factor=1.1
        ),
    ),
]


@pytest.mark.parametrize("head_dim, theirs, ours", CASES, ids=lambda x: getattr(x, "kind", ""))
def test_frequencies_agree_with_transformers(head_dim, theirs, ours):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, rope_parameters=dict(theirs)
    )
    want, factor = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, "cpu")
    got, got_factor = frequencies(head_dim, theirs["rope_theta"], ours)
    # Theirs are computed in float32, ours in float64 and rounded once.
    np.testing.assert_allclose(got, want.numpy(), rtol=2e-6)
    assert got_factor == pytest.approx(factor, rel=1e-12)


def test_rotation_is_a_complex_product():
    """Pair (i, i + H/2) turns by position * frequency; checked in complex128."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 3, 8)).astype(np.float32)
    positions = rng.integers(0, 1000, (2, 5)).astype(np.int32)
    inverse, factor = frequencies(8, 10_000.0, None)
    got = apply_rope(jnp.asarray(x), *rotary_tables(jnp.asarray(positions), inverse, factor))
    pairs = x[..., :4].astype(np.float64) + 1j * x[..., 4:]
    turned = pairs * np.exp(1j * positions[..., None, None] * inverse.astype(np.float64))
    want = np.concatenate([turned.real, turned.imag], axis=-1)
    # float32 angles of up to 1000 radians are off by 6e-5 at most
    np.testing.assert_allclose(np.asarray(got), want, atol=3e-4)


def test_scores_depend_on_distance_only():
    """The property that makes it relative: q at m and k at n score as q at m + 7 and k at n + 7."""
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.standard_normal((1, 6, 1, 16)), jnp.float32) for _ in range(2))
    inverse, factor = frequencies(16, 10_000.0, None)

    def scores(shift):
        tables = rotary_tables(jnp.arange(6)[None] + shift, inverse, factor)
        return jnp.einsum("btnh,bsnh->bts", apply_rope(q, *tables), apply_rope(k, *tables))

    np.testing.assert_allclose(scores(0), scores(7), atol=1e-5)
