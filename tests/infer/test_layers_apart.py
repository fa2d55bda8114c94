"""Layers with arrays of their own, as GPUs need them, on pretended CPU devices: `tree.PerLayer`."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llm_jax import LLM, Engine, EngineConfig, ModelConfig, SamplingParams
from llm_jax.checkpoint.hf import export_hf
from llm_jax.infer import llm as llm_module
from llm_jax.models import describe, init_params
from llm_jax.sharding import make_mesh
from llm_jax.tree import PerLayer, unstack

SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 96, "max_positions": 64}
MODEL = describe(ModelConfig("llama", 64, 3, 64, **SIZES))
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
ASKED = SamplingParams(max_new_tokens=8, temperature=0, logprobs=0, ignore_eos=True)


@pytest.fixture
def apart(monkeypatch):
    monkeypatch.setattr(llm_module, "_layers_lie_apart", lambda mesh: True)


@pytest.mark.parametrize("release", [False, True])
def test_copies_have_their_shards_and_stacks_may_go(release):
    mesh = make_mesh("fsdp:2,tensor:2", jax.devices()[:4])
    stacked = init_params(MODEL, mesh, jax.random.key(0))["layers"]
    expected = jax.tree.map(np.asarray, stacked)
    parts = unstack(stacked, release=release)

    def check(part, stack, values):
        assert isinstance(part, PerLayer) and len(part.parts) == 3
        assert stack.is_deleted() == release
        for i, one in enumerate(part.parts):
            np.testing.assert_array_equal(one, values[i])
            assert one.sharding.spec == PartitionSpec(*stack.sharding.spec[1:])

    jax.tree.map(check, parts, stacked, expected, is_leaf=lambda x: isinstance(x, PerLayer))
    assert unstack(parts, release=True) == parts, "what lies apart stays as it is"


@pytest.mark.parametrize(
    "mesh", ["tensor:2", pytest.param("data:2,fsdp:2", marks=pytest.mark.slow), "tensor:4"]
)
def test_texts_are_the_same(apart, mesh):
    one, there = (
        LLM.from_params(MODEL, init_params(MODEL, make_mesh(on), jax.random.key(1)), None, mesh=on)
        for on in ("data:1", mesh)
    )
    assert all(isinstance(x, PerLayer) for x in layers(there))
    expected = one.generate(PROMPTS, ASKED)
    config = EngineConfig(max_rows=4, max_length=32, token_budget=16, compile_ahead=False)
    for found in (there.generate(PROMPTS, ASKED), Engine(there, config).generate(PROMPTS, ASKED)):
        assert [x.token_ids for x in found] == [x.token_ids for x in expected]
        np.testing.assert_allclose(
            [x.logprobs for x in found], [x.logprobs for x in expected], atol=1e-5
        )


def test_what_is_read_from_a_directory_is_held_once(apart, tmp_path, monkeypatch):
    params = init_params(MODEL, make_mesh(""), jax.random.key(2))
    export_hf(tmp_path / "model", MODEL, params)
    loaded = []
    real = llm_module.load_hf
    monkeypatch.setattr(llm_module, "load_hf", lambda *a, **k: loaded.append(real(*a, **k)) or loaded[0])
    monkeypatch.setattr(llm_module, "load_tokenizer", lambda _: None)
    llm = LLM(str(tmp_path / "model"), mesh="tensor:2")
    assert all(x.is_deleted() for x in jax.tree.leaves(loaded[0]["layers"]))
    given = LLM.from_params(MODEL, params, None, mesh="")
    assert not any(x.is_deleted() for x in jax.tree.leaves(params)), "the caller's"
    tokens = [[x.token_ids for x in each.generate(PROMPTS, ASKED)] for each in (llm, given)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("platform", "devices", "apart"),
    [("cpu", 1, True), ("cpu", 2, False), ("gpu", 1, True), ("gpu", 8, True), ("tpu", 1, False)],
)
def test_which_devices_have_them(platform, devices, apart):
    mesh = SimpleNamespace(
        size=devices, devices=np.array([SimpleNamespace(platform=platform)] * devices)
    )
    assert llm_module._layers_lie_apart(mesh) == apart


def layers(llm):
    return jax.tree.leaves(llm.params["layers"], is_leaf=lambda x: isinstance(x, PerLayer))
