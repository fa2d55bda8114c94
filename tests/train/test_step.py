"""The train step: parts equal the whole, every mesh gives the same numbers, and it learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.config import ModelConfig, OptimConfig
from llm_jax.models import describe
from llm_jax.sharding import make_mesh
from llm_jax.train.objectives import lm_loss
from llm_jax.train.optim import make_optimizer
from llm_jax.train.state import abstract_state, start_state
from llm_jax.train.step import make_train_step

CONFIG = ModelConfig(
    "llama",
    vocab_size=50,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    max_positions=16,
    param_dtype="float32",
)
OPTIM = OptimConfig(5e-3, "constant", weight_decay=0.1, ema_decay=0.9)
STEPS = 120


def batch(rows=8, length=12):
    """Packed rows of two documents each; the second is longer in later rows."""
    rng = np.random.default_rng(0)
    columns = np.tile(np.arange(length), (rows, 1))
    first = columns < 5
    end = np.minimum(length, 7 + np.arange(rows))[:, None]
    segments = np.where(first, 1, np.where(columns < end, 2, 0))
    tokens = np.where(segments > 0, rng.integers(1, CONFIG.vocab_size, columns.shape), 0)
    inner = np.roll(segments, -1, axis=1) == segments
    inner[:, -1] = False
    return {
        "tokens": tokens.astype(np.int32),
        "targets": np.where(inner & (segments > 0), np.roll(tokens, -1, 1), -1).astype(np.int32),
        "segment_ids": segments.astype(np.int32),
        "positions": np.where(first, columns, columns - 5).astype(np.int32),
    }


@functools.cache
def setup(mesh="data:1", accumulate=1, config=CONFIG):
    """(model, optimizer, mesh, step); compiled once for each."""
    model, mesh = describe(config), make_mesh(mesh)
    optimizer = make_optimizer(OPTIM, model, STEPS)
    return (
        model,
        optimizer,
        mesh,
        make_train_step(model, lm_loss, optimizer, mesh, accumulate=accumulate),
    )


def start(model, optimizer, mesh, step):
    """State at step 0 with the same parameters on every mesh."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s, sharding: jax.device_put(
            rng.normal(1.0 if s.shape[-1] == s.size else 0.0, 0.1, s.shape).astype(s.dtype), sharding
        ),
        model.shapes,
        model.shardings(mesh),
    )
    return start_state(params, model, optimizer, mesh)


def train(steps=10, rows=None, **where):
    """(final state, metrics of each step)."""
    parts = setup(**where)
    state, history = start(*parts), []
    for _ in range(steps):
        state, metrics = parts[-1](state, rows or batch(), jax.random.key(1))
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


@pytest.fixture
def whole():
    return _whole()


@functools.cache
def _whole():
    return train(STEPS)


def same(history, whole, steps=10):
    """Losses agree within float32 rounding; gradients, sums of more terms, a little less closely."""
    for ours, expected in zip(history[:steps], whole[1], strict=False):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert ours["tokens"] == expected["tokens"]
        assert ours["accuracy"] == pytest.approx(expected["accuracy"])


def test_metrics_of_a_step(whole):
    _, history = whole
    assert history[0].keys() == {"loss", "accuracy", "grad_norm", "learning_rate", "tokens", "bad"}
    assert history[0]["tokens"] == np.sum(batch()["segment_ids"] > 0)
    assert history[0]["loss"] == pytest.approx(np.log(CONFIG.vocab_size), rel=0.3)
    assert [history[i]["learning_rate"] for i in (0, 3, 6)] == pytest.approx([0.0, 2.5e-3, 5e-3])


def test_a_tiny_set_is_learnt_by_heart(whole):
    # All but the second tokens can be known from what stands before them.
    assert whole[1][-1]["loss"] < 0.2 and whole[1][-1]["accuracy"] > 0.95


def test_accumulated_parts_equal_the_large_batch(whole):
    # Parts hold different numbers of targets, so a mean of means would be wrong by far more.
    same(train(accumulate=4)[1], whole)


@pytest.mark.parametrize(
    ("mesh", "accumulate"),
    [
        ("data:2,fsdp:2,tensor:2", 2),
        ("tensor:4", 1),  # more than the 2 key heads, and no divisor of 50 words: both stay whole
        pytest.param("data:8", 1, marks=pytest.mark.slow),
        pytest.param("fsdp:4,tensor:2", 1, marks=pytest.mark.slow),
    ],
)
def test_every_mesh_gives_the_numbers_of_one_device(whole, mesh, accumulate):
    same(train(mesh=mesh, accumulate=accumulate)[1], whole)


def test_moments_and_average_lie_where_their_parameter_lies():
    parts = setup(mesh="data:2,fsdp:2,tensor:2", accumulate=2)
    state, like = start(*parts), abstract_state(*parts[:3])
    assert jax.tree.structure(state) == jax.tree.structure(like)
    jax.tree.map(_same_place, state, like)
    after, _ = parts[-1](state, batch(), jax.random.key(0))
    jax.tree.map(_same_place, after, like)
    (adam,) = (s for s in after.opt_state if hasattr(s, "mu"))
    for moments in (adam.mu, adam.nu, after.ema):
        jax.tree.map(_same_place, moments, after.params)
    wq = after.params["layers"]["attn"]["wq"]  # heads over tensor, embed over fsdp
    assert wq.addressable_shards[0].data.size * 4 == wq.size
    assert all(x.is_deleted() for x in jax.tree.leaves(state)), "the state is donated"


def _same_place(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert a.sharding.is_equivalent_to(b.sharding, len(a.shape))


def test_dropout_differs_from_step_to_step_and_not_from_run_to_run(whole):
    config = dataclasses.replace(CONFIG, dropout=0.3)
    _, history = train(3, config=config)
    assert history == train(3, config=config)[1]
    # The learning rate of step 0 is 0, so only the mask makes the loss of step 1 another.
    losses = [h["loss"] for h in history]
    assert losses[0] != losses[1] and losses[0] != whole[1][0]["loss"]


def test_bfloat16_compute_keeps_float32_parameters_and_moments_and_learns_the_same(whole):
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    state, history = train(config=config)
    kept = jax.tree.leaves((state.params, state.opt_state, state.ema, state.losses))
    floats = {x.dtype for x in kept if jnp.issubdtype(x.dtype, jnp.floating)}
    assert floats == {jnp.dtype("float32")}
    # bfloat16 keeps 8 bits, which is 0.4% of an activation; float32 products would agree far better.
    losses, expected = (np.array([h["loss"] for h in run]) for run in (history, whole[1][:10]))
    np.testing.assert_allclose(losses, expected, rtol=0.02)
    assert np.abs(losses / expected - 1).max() > 1e-5, "bfloat16 was computed with"
    assert history[-1]["loss"] < history[0]["loss"]


def test_a_batch_without_targets_has_the_gradient_zero(whole):
    empty = batch() | {"targets": np.full((8, 12), -1, np.int32)}
    state, history = train(2, rows=empty)
    assert history[1]["loss"] == history[1]["grad_norm"] == 0.0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
