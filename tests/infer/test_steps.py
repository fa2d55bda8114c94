"""What the compiled steps contain: nothing grows with depth, no collective is unowed."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.cache import init_cache
from llm_jax.config import ModelConfig
from llm_jax.infer.steps import DecodeState, make_decode, make_forward, make_prefill
from llm_jax.models import describe, init_params
from llm_jax.models.key_heads import served
from llm_jax.ops.sampling import SamplingParams, pack
from llm_jax.sharding import batch_sharding, make_mesh

CONFIG = ModelConfig(
    "llama", 256, 4, 64, num_heads=8, num_kv_heads=4, head_dim=8, mlp_dim=96, max_positions=64
)


def abstract(model, mesh, batch=4):
    """Shapes and shardings of parameters and cache."""
    shapes = jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
        model.shapes,
        model.shardings(mesh),
    )
    cache = init_cache(model.config, batch, 32, mesh)
    return shapes, jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), cache
    )


def forward_text(layers, mesh):
    model = served(describe(dataclasses.replace(CONFIG, num_layers=layers)), mesh)
    with jax.set_mesh(mesh):
        params, cache = abstract(model, mesh)
        tokens = jax.ShapeDtypeStruct((4,), jnp.int32, sharding=batch_sharding(mesh, (4,)))
        return make_forward(model).lower(params, cache, tokens).compile().as_text()


def collectives(text):
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return sorted(re.findall(rf" ({kinds})(?:-start)?\(", text))


@pytest.mark.parametrize("mesh", ["data:2,tensor:4", "tensor:8"])
def test_the_decode_step_has_two_all_reduces_a_layer_and_no_other_collective_in_the_scan(mesh):
    """On the second mesh 4 key heads are repeated (models/key_heads.py)."""
    text = forward_text(4, make_mesh(mesh))
    # in the scanned body: after wo and after down; outside: the sharded embedding, the gathered logits
    assert collectives(text) == ["all-gather"] + ["all-reduce"] * 3


def test_the_program_does_not_grow_with_depth():
    shallow, deep = (forward_text(n, make_mesh("data:2,tensor:4")) for n in (4, 16))
    assert collectives(shallow) == collectives(deep)
    assert deep.count("\n") < 1.01 * shallow.count("\n")


def test_caches_are_donated_and_updated_in_place():
    model, mesh = describe(CONFIG), make_mesh("")
    params = init_params(model, mesh, jax.random.key(0))
    cache = init_cache(model.config, 2, 32, mesh)
    tokens, lengths = np.ones((2, 16), np.int32), np.array([16, 3], np.int32)
    compiled = make_prefill(model).lower(params, cache, tokens, lengths).compile()
    pool_bytes = sum(x.nbytes for x in cache.full)
    assert compiled.memory_analysis().alias_size_in_bytes >= pool_bytes
    _, after = make_prefill(model)(params, cache, tokens, lengths)
    assert jax.tree.leaves(cache)[0].is_deleted()
    np.testing.assert_array_equal(after.length, lengths)


@pytest.mark.parametrize("max_steps", [1, 4, 8])
def test_steps_stop_when_asked_and_when_every_row_is_done(max_steps):
    model, mesh = describe(CONFIG), make_mesh("")
    params = init_params(model, mesh, jax.random.key(0))
    prompts = np.ones((2, 16), np.int32)
    sampling, features = pack(
        [SamplingParams(temperature=0)] * 2,
        prompts.tolist(),
        vocab_size=256,
        sample_index=[0, 0],
        stop_ids=[[], []],
        default_seed=0,
    )
    _, cache = make_prefill(model)(
        params, init_cache(model.config, 2, 32, mesh), prompts, np.full(2, 16)
    )
    decode = make_decode(model, features, max_steps)
    stops = np.full((2, 1), -1, np.int32)
    budget = np.array([2, 6], np.int32)
    state = DecodeState(np.zeros(2, np.int32), np.zeros(2, bool), budget, stops, sampling)
    ticks, state, cache = decode(params, cache, state, np.int32(max_steps))
    steps = min(max_steps, 6)
    assert int(ticks.count) == steps
    emitted = (np.asarray(ticks.tokens)[:steps] >= 0).sum(axis=0)
    np.testing.assert_array_equal(emitted, np.minimum([2, 6], steps))
    np.testing.assert_array_equal(cache.length, 16 + emitted)
