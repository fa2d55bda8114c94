"""The draft head: its cell against NumPy, its shards, and the directory that it is kept in."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llm_jax.checkpoint.draft_head import export_draft_head, load_draft_head
from llm_jax.checkpoint.hf import load_config, load_hf
from llm_jax.checkpoint.tensor_file import write_tensors
from llm_jax.config import ModelConfig
from llm_jax.models import describe
from llm_jax.models.draft_head import describe_draft_head, init_draft_head
from llm_jax.sharding import make_mesh
from llm_jax.tree import flatten
from tests import draft_cell, tiny

SIZES = {"num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "mlp_dim": 24}
LLAMA = ModelConfig("llama", vocab_size=31, embed_dim=16, max_positions=32, **SIZES)
CONFIGS = {
    "llama": LLAMA,
    "gpt2": dataclasses.replace(LLAMA, norm="layer", activation="gelu_tanh", norm_eps=1e-5),
    "gemma": dataclasses.replace(LLAMA, norm_plus_one=True, activation="gelu"),
}


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_cell_is_the_formula(name, lead):
    head = describe_draft_head(CONFIGS[name], width=12)
    params = draft_cell.drawn(head)
    state, token = np.random.default_rng(1).normal(0.0, 1.5, (2, *lead, 16)).astype(np.float32)
    found = jax.jit(lambda p, s, t: head.bind(p)(s, t))(params, state, token)
    expected = draft_cell.cell(head.config, params, state.astype(float), token.astype(float))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_it_begins_as_the_identity_and_keeps_the_dtype_of_the_state():
    head = describe_draft_head(LLAMA, width=40)
    params = init_draft_head(head, make_mesh(""), jax.random.key(0))
    state = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16)), jnp.bfloat16)
    after = head.bind(params)(state, state + 1)
    assert after.dtype == jnp.bfloat16
    np.testing.assert_array_equal(after, state)
    assert {path: x.shape for path, x in flatten(params).items()} == {
        "down": (16, 40),
        "state_norm/scale": (16,),
        "token_norm/scale": (16,),
        "up_state": (40, 16),
        "up_token": (40, 16),
    }
    for name in ("up_state", "up_token"):  # standard deviation 1 / sqrt(D)
        assert abs(np.asarray(params[name]).std() * 4 - 1) < 0.15


@pytest.mark.parametrize("mesh", ["fsdp:2", "tensor:2", "fsdp:2,tensor:2"])
def test_its_shards_compute_what_the_whole_does(mesh):
    mesh, head = make_mesh(mesh), describe_draft_head(LLAMA, width=12)
    whole = draft_cell.drawn(head)
    params = jax.device_put(whole, head.shardings(mesh))
    part = params["down"].addressable_shards[0].data.shape
    assert part == (16 // mesh.shape["fsdp"], 12 // mesh.shape["tensor"])
    state, token = np.random.default_rng(1).normal(size=(2, 4, 16)).astype(np.float32)
    run = jax.jit(lambda p, s, t: head.bind(p)(s, t))
    with jax.set_mesh(mesh):
        found = run(params, state, token)
    np.testing.assert_allclose(found, run(whole, state, token), rtol=1e-5, atol=1e-5)
    drawn = init_draft_head(head, mesh, jax.random.key(3))
    alone = init_draft_head(head, make_mesh(""), jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, drawn, alone)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_lookup_is_the_embedding_of_transformers(tmp_path, name):
    theirs = tiny.DECODERS[name].save(tmp_path)
    model = describe(load_config(tmp_path))
    params = load_hf(tmp_path, model, make_mesh(""))
    tokens = np.array([[3, 1, 96], [0, 5, 5]], np.int32)
    found = jax.jit(lambda p, t: model.bind(p).embed.lookup(t))(params, tokens)
    expected = theirs.get_input_embeddings()(torch.tensor(tokens)).detach().numpy()
    if name == "gemma2" and not hasattr(theirs.get_input_embeddings(), "embed_scale"):
        expected = expected * 48**0.5  # which transformers multiplies by in the model, not in the table
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_it_is_refused_for_what_predicts_no_next_token():
    encoder = dataclasses.replace(LLAMA, causal=False, head="masked_lm")
    with pytest.raises(ValueError, match="head='masked_lm', causal=False: expected 'lm' and True"):
        describe_draft_head(encoder, 8)
    with pytest.raises(ValueError, match="width=0: expected 1 or more"):
        describe_draft_head(LLAMA, 0)


@pytest.fixture
def exported(tmp_path):
    """(directory, parameters) of a written head."""
    head = describe_draft_head(LLAMA, width=12)
    params = draft_cell.drawn(head)
    return export_draft_head(tmp_path / "head", head, params, base="some/model"), params


@pytest.mark.parametrize("mesh", ["", "fsdp:2,tensor:2"])
def test_what_is_written_is_what_is_read(exported, mesh):
    directory, params = exported
    head, found = load_draft_head(directory, describe(LLAMA), make_mesh(mesh))
    assert head.width == 12 and head.config.embed_dim == 16
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert flatten(found)["down"].sharding == flatten(head.shardings(make_mesh(mesh)))["down"]
    with pytest.raises(ValueError, match="exists already and is not empty"):
        export_draft_head(directory, head, params)
    assert [path.name for path in directory.parent.iterdir()] == ["head"]


def test_it_is_read_in_the_dtype_of_the_model(exported):
    directory, params = exported
    model = describe(dataclasses.replace(LLAMA, param_dtype="bfloat16"))
    _, found = load_draft_head(directory, model, make_mesh(""))
    np.testing.assert_array_equal(found["down"], params["down"].astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"embed_dim": 20}, r"embed_dim=16: expected 20, that of the model; .* head of 'some/model'"),
        ({"vocab_size": 32}, "vocab_size=31: expected 32"),
        ({"activation": "relu"}, "activation='silu': expected 'relu'"),
    ],
)
def test_a_head_of_another_model_is_refused(exported, change, message):
    with pytest.raises(ValueError, match=message):
        load_draft_head(exported[0], describe(dataclasses.replace(LLAMA, **change)), make_mesh(""))


def test_a_damaged_directory_is_refused(exported):
    directory, params = exported
    load = lambda: load_draft_head(directory, describe(LLAMA), make_mesh(""))  # noqa: E731
    tensors, about = directory / "draft_head.safetensors", directory / "draft_head.json"
    flat = flatten(params) | {"other": np.zeros(3, np.float32)}
    write_tensors(tensors, {n: (x.dtype, x.shape) for n, x in flat.items()}, flat.__getitem__)
    with pytest.raises(ValueError, match="it has tensors .*other"):
        load()
    tensors.unlink()
    with pytest.raises(ValueError, match="draft_head.safetensors is missing"):
        load()
    about.write_text(json.dumps(json.loads(about.read_text()) | {"width": "12"}))
    with pytest.raises(ValueError, match="width='12': expected 1 or more"):
        load()
    about.write_text("{")
    with pytest.raises(ValueError, match="draft_head.json is not valid JSON"):
        load()
    about.unlink()
    with pytest.raises(ValueError, match="draft_head.json is missing; expected the draft_head folder"):
        load()
