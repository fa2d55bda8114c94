"""Training split over eight devices: the loss curve of one device, and no device holds what is split."""

import functools

import jax
import numpy as np
import pytest

from llm_jax.config import OPTIMIZERS, ModelConfig, OptimConfig
from llm_jax.models import describe
from llm_jax.sharding import is_axes, make_mesh
from llm_jax.train.objectives import lm_loss
from llm_jax.train.optim import make_optimizer
from llm_jax.train.state import abstract_state, init_state
from llm_jax.train.step import make_train_step
from llm_jax.tree import flatten

CONFIG = ModelConfig(  # every axis that a mesh may split is a multiple of 8
    "llama",
    vocab_size=64,
    num_layers=2,
    embed_dim=32,
    num_heads=8,
    num_kv_heads=8,
    head_dim=4,
    mlp_dim=48,
    max_positions=16,
    param_dtype="float32",
)
STEPS = 50
LEARNING_RATES = {"adamw": 3e-3, "adafactor": 3e-2, "lion": 1e-3, "muon": 3e-3, "sgd": 0.1}
SPLIT_BY = {"fsdp": {"embed"}, "tensor": {"vocab", "heads", "kv_heads", "head_features", "mlp"}}


def batch(step):
    rng = np.random.default_rng(step)
    start = rng.integers(0, 64, (8, 1))
    tokens = (start + 3 * np.arange(17)) % 64
    tokens = np.where(rng.random(tokens.shape) < 0.1, rng.integers(0, 64, tokens.shape), tokens)
    ones = np.ones((8, 16), np.int32)
    return {
        "tokens": tokens[:, :-1].astype(np.int32),
        "targets": tokens[:, 1:].astype(np.int32),
        "segment_ids": ones,
        "positions": np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16)),
    }


@functools.cache
def train(mesh, optimizer="adamw", steps=STEPS):
    """(losses, shapes of the first state and of its shards, last state), from random parameters."""
    model, mesh = describe(CONFIG), make_mesh(mesh)
    config = OptimConfig(LEARNING_RATES[optimizer], optimizer=optimizer, weight_decay=0.1, ema_decay=0.9)
    rule = make_optimizer(config, model, STEPS)
    step = make_train_step(model, lm_loss, rule, mesh)
    first = state = init_state(model, rule, mesh, jax.random.key(0))
    places = jax.tree.map(lambda x: (x.shape, x.addressable_shards[0].data.shape), first)
    losses = []
    for number in range(steps):
        state, metrics = step(state, batch(number), jax.random.key(1))
        losses.append(float(metrics["loss"]))
    return losses, places, state


def parts(mesh, path):
    """In how many parts the parameter with the axes of `path` lies on `mesh`."""
    axes = set(flatten(describe(CONFIG).axes, is_leaf=is_axes)[path])
    sizes = make_mesh(mesh).shape
    return int(np.prod([sizes[axis] for axis, names in SPLIT_BY.items() if axes & names]))


MIXED = "data:2,fsdp:2,tensor:2"
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("mesh", [MIXED, slow("data:8"), slow("fsdp:8"), slow("tensor:8")])
def test_fifty_steps_on_eight_devices_are_those_of_one(mesh):
    losses, expected = train(mesh)[0], train("data:1")[0]
    assert expected[-1] < 0.6 * expected[0]
    # Sums in another order: 1e-7 a step in float32, which the steps after it carry on.
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("mesh", [MIXED, slow("fsdp:8"), slow("tensor:8")])
def test_no_device_holds_a_parameter_a_moment_or_an_average_that_is_split(mesh):
    _, places, state = train(mesh)
    (adam,) = (s for s in state.opt_state if hasattr(s, "mu"))
    for tree in (state.params, adam.mu, adam.nu, state.ema):
        for path, x in flatten(tree).items():
            for shard in x.addressable_shards:
                assert shard.data.size * parts(mesh, path) == x.size, path
    after = jax.tree.map(lambda x: (x.shape, x.addressable_shards[0].data.shape), state)
    assert places == after, "born where they stay"
    split = [path for path in flatten(state.params) if parts(mesh, path) > 1]
    assert len(split) >= 8


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_moments_of_every_optimizer_are_split_as_their_parameters_are(optimizer):
    model, mesh = describe(CONFIG), make_mesh(MIXED)
    rule = make_optimizer(OptimConfig(1e-3, optimizer=optimizer), model, STEPS)
    state = abstract_state(model, rule, mesh)
    largest = max(np.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state.params))
    held = [np.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state.opt_state)]
    # Factored moments, which stay whole, are a small part of a matrix.
    assert max(held) <= largest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "tolerance"), [("muon", 1e-4), ("adafactor", 1e-5), ("lion", 1e-4), ("sgd", 1e-5)]
)
def test_every_optimizer_is_the_same_on_a_mesh(optimizer, tolerance):
    losses, expected = train(MIXED, optimizer, 6)[0], train("data:1", optimizer, 6)[0]
    assert expected[-1] < expected[0] - 0.05
    # Lion takes signs and Muon makes small singular values large: rounding may move single weights.
    np.testing.assert_allclose(losses, expected, rtol=tolerance)
