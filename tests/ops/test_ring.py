"""Sequences split over the mesh axis "context" give what whole ones give, and their gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.config import ModelConfig, OptimConfig
from llm_jax.models import describe, init_params
from llm_jax.ops.attention import AttentionOptions, FullContext
from llm_jax.sharding import balanced, make_mesh
from llm_jax.train.objectives import lm_loss
from llm_jax.train.optim import make_optimizer
from llm_jax.train.state import abstract_state, init_state
from llm_jax.train.step import make_train_step

TOKENS = 32
CONFIG = ModelConfig(
    "gemma2",
    vocab_size=64,
    num_layers=4,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    max_positions=64,
    windows=(6, 0, 6, 0),
    attn_softcap=30.0,
    norm_position="sandwich",
    param_dtype="float32",
)


def inputs(packed: bool):
    """q, k, v [2, 32, 4 or 2, 8], positions and segments, of one document a row or of several."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, TOKENS, n, 8)).astype(np.float32) for n in (4, 2, 2))
    positions = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (2, TOKENS))
    segments = np.ones((2, TOKENS), np.int32)
    if packed:
        segments = np.array([[1] * 5 + [2] * 20 + [3] * 4 + [0] * 3, [1] * 17 + [2] * 15], np.int32)
        positions = np.array([[i - list(row).index(s) for i, s in enumerate(row)] for row in segments])
    return q, k, v, positions.astype(np.int32), segments


def attention(mesh, q, k, v, positions, segments, window, options):
    """(output, gradients of q, k and v) on a mesh, "" = on one device."""

    def run(q, k, v, window):
        context = FullContext(jnp.asarray(segments))
        how = {"positions": jnp.asarray(positions), "window": window, "options": options}
        out, _ = context.attend(0, q, k, v, **how)
        real = jnp.asarray(segments > 0)[..., None, None]
        return jnp.sum(jnp.where(real, out, 0.0) * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    static = 3 if isinstance(window, int) else ()
    gradient = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)
    with jax.set_mesh(make_mesh(mesh)):
        (_, out), grads = jax.jit(gradient, static_argnums=static)(q, k, v, window)
    return np.where((segments > 0)[..., None, None], out, 0.0), grads


@pytest.mark.parametrize("mesh", ["context:8", "data:2,context:2,tensor:2"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize(
    ("causal", "window", "softcap"),
    [(True, 0, None), (False, 0, None), (True, 5, 20.0), (True, "scanned", None)],
)
def test_a_split_sequence_attends_as_a_whole_one(mesh, packed, causal, window, softcap):
    options = AttentionOptions(causal, 8**-0.5, softcap, windows=(0, 5))
    window = np.int32(5) if window == "scanned" else window
    given = (*inputs(packed), window, options)
    out, grads = attention(mesh, *given)
    expected, expected_grads = attention("", *given)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)
    for found, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5)


def test_balanced_gives_every_device_an_early_and_a_late_piece():
    x = jnp.arange(16)[None]
    with jax.set_mesh(make_mesh("context:4,data:2")):
        found = jax.jit(balanced)(x)
    assert found[0].tolist() == [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
    assert balanced(x) is x


def batch(step: int):
    rng = np.random.default_rng(step)
    tokens = (rng.integers(0, 64, (4, 1)) + 3 * np.arange(TOKENS + 1)) % 64
    segments = np.repeat([[1] * 20 + [2] * 12], 4, axis=0).astype(np.int32)
    positions = np.concatenate([np.arange(20), np.arange(12)])
    return {
        "tokens": tokens[:, :-1].astype(np.int32),
        "targets": tokens[:, 1:].astype(np.int32),
        "segment_ids": segments,
        "positions": np.broadcast_to(positions.astype(np.int32), (4, TOKENS)),
    }


@functools.cache
def losses(mesh: str, remat: str = "none") -> list[float]:
    model, mesh_ = describe(dataclasses.replace(CONFIG, remat=remat)), make_mesh(mesh)
    rule = make_optimizer(OptimConfig(3e-3), model, 8)
    step = make_train_step(model, lm_loss, rule, mesh_)
    state, found = init_state(model, rule, mesh_, jax.random.key(0)), []
    for number in range(8):
        state, metrics = step(state, batch(number), jax.random.key(1))
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.parametrize(
    ("mesh", "remat"),
    [
        ("fsdp:2,context:2,tensor:2", "none"),
        pytest.param("context:8", "full", marks=pytest.mark.slow),
        pytest.param("data:2,context:4", "dots", marks=pytest.mark.slow),
    ],
)
def test_training_on_split_sequences_is_training(mesh, remat):
    expected = losses("data:1")
    assert expected[-1] < expected[0] - 0.1
    np.testing.assert_allclose(losses(mesh, remat), expected, rtol=1e-5)


def test_keys_go_round_and_activations_stay():
    """Of a step on context:8 nothing but keys, gradients of weights and small numbers travels."""
    model, mesh = describe(dataclasses.replace(CONFIG, num_kv_heads=4)), make_mesh("context:8")
    rule = make_optimizer(OptimConfig(3e-3), model, 8)
    step = make_train_step(model, lm_loss, rule, mesh)
    given = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in batch(0).items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    text = step.lower(abstract_state(model, rule, mesh), given, key).compile().as_text()
    assert "collective-permute" in text
    wide = 4 * TOKENS * CONFIG.embed_dim  # of hidden states
    gathered = [line for line in text.splitlines() if " all-gather(" in line]
    sizes = [np.prod([int(n) for n in line.split("[")[1].split("]")[0].split(",")]) for line in gathered]
    assert max(sizes, default=0) < wide


def test_what_is_not_divided_stays_whole():
    params = init_params(describe(CONFIG), make_mesh("context:8"), jax.random.key(0))
    net = describe(CONFIG)
    tokens = np.arange(2 * 12, dtype=np.int32).reshape(2, 12) % 64
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))

    def run(params):
        context = FullContext(jnp.ones((2, 12), jnp.int32))
        return net.bind(params)(jnp.asarray(tokens), jnp.asarray(positions), context)[0]

    with jax.set_mesh(make_mesh("context:8")):
        split = jax.jit(run)(params)
    whole = jax.jit(run)(jax.device_get(params))
    np.testing.assert_allclose(split, whole, rtol=2e-5, atol=2e-6)
