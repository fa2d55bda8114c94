"""Orbax checkpoints: onto another mesh, whole or not at all, and errors that say what is wrong."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from llm_jax.checkpoint import store
from llm_jax.config import ModelConfig, OptimConfig
from llm_jax.models import describe
from llm_jax.sharding import make_mesh
from llm_jax.train.optim import make_optimizer
from llm_jax.train.state import abstract_state, start_state

CONFIG = ModelConfig(
    "llama",
    vocab_size=24,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    mlp_dim=8,
    max_positions=8,
    param_dtype="float32",
)


def random_params(model, mesh, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s, sharding: jax.device_put(rng.normal(size=s.shape).astype(s.dtype), sharding),
        model.shapes,
        model.shardings(mesh),
    )


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(directory with steps 3 and 4, the state saved there on data:2,tensor:2, model, optimizer)."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    model = describe(CONFIG)
    optimizer = make_optimizer(OptimConfig(1e-3, ema_decay=0.9), model, 10)
    mesh = make_mesh("data:2,tensor:2")
    state = start_state(random_params(model, mesh), model, optimizer, mesh)
    with store.open_checkpoints(directory, keep=2) as checkpoints:
        for step in (2, 3, 4):
            store.save(checkpoints, step, items(state))
    return directory, state, model, optimizer


def items(state):
    rest = {"step": state.step, "opt_state": state.opt_state}
    return {"params": state.params, "ema": state.ema, "train": rest}


@pytest.mark.parametrize("mesh", ["tensor:4", "data:1", "data:2,fsdp:2,tensor:2"])
def test_state_is_restored_onto_another_mesh(saved, mesh):
    directory, state, model, optimizer = saved
    like = items(abstract_state(model, optimizer, make_mesh(mesh)))
    restored = store.restore(directory, like)
    assert jax.tree.structure(restored) == jax.tree.structure(items(state))
    equal(restored, items(state))
    jax.tree.map(lambda x, s: _placed(x, s), restored, like)


def _placed(x, like):
    assert x.sharding.is_equivalent_to(like.sharding, x.ndim) and x.dtype == like.dtype


def test_only_the_newest_are_kept_and_any_of_them_is_read(saved):
    directory, state, model, _ = saved
    assert sorted(p.name for p in directory.iterdir()) == ["3", "4"]
    assert store.latest_step(directory) == 4
    like = {"params": store.abstract_params(model, make_mesh("data:1"))}
    equal(store.restore(directory, like, step=3)["params"], state.params)


def test_inference_reads_the_parameters_alone_in_its_own_dtype(saved):
    directory, state, _, _ = saved
    model = describe(dataclasses.replace(CONFIG, param_dtype="bfloat16"))
    params = store.restore_params(directory / "4", model, make_mesh("tensor:2"), item="ema")
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.float32(a), b, rtol=2**-8), params, state.ema
    )


def test_parameters_alone_are_saved_and_restored(tmp_path):
    model, mesh = describe(CONFIG), make_mesh("fsdp:2")
    params = random_params(model, mesh, 1)
    store.save_params(tmp_path, params)
    equal(store.restore_params(tmp_path, model, make_mesh("tensor:4")), params)


def test_a_save_that_did_not_end_is_not_seen(saved, tmp_path):
    directory = tmp_path / "checkpoints"
    half = directory / "9.orbax-checkpoint-tmp" / "params.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    assert store.latest_step(directory) is None
    like = {"params": store.abstract_params(saved[2], make_mesh("data:1"))}
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*9\.orbax-checkpoint-tmp"):
        store.restore(directory, like)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 7"):
        store.restore(saved[0], like, step=7)
    with pytest.raises(FileNotFoundError, match="no directory"):
        store.restore(tmp_path / "nowhere", like)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_dim": 12}, r"mlp/down.*\(2, 16, 8\).*\(2, 16, 12\)"),
        ({"qkv_bias": True}, "lacks.*attn/bq"),
    ],
)
def test_another_model_is_refused_by_name(saved, change, message):
    model = describe(dataclasses.replace(CONFIG, **change))
    with pytest.raises(ValueError, match=message):
        store.restore_params(saved[0] / "4", model, make_mesh("data:1"))


def test_a_missing_item_is_refused(saved, tmp_path):
    store.save_params(tmp_path, random_params(saved[2], make_mesh("data:1")))
    with pytest.raises(FileNotFoundError, match=r"holds no 'ema'.*found.*params"):
        store.restore_params(tmp_path, saved[2], make_mesh("data:1"), item="ema")


def test_saving_something_else_is_refused(saved, tmp_path):
    with store.open_checkpoints(tmp_path, keep=1) as checkpoints:
        with pytest.raises(ValueError, match=r"\['weights'\].*params"):
            store.save(checkpoints, 1, {"weights": saved[1].params})
    assert os.listdir(tmp_path) == []
