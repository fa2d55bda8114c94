"""Rounding to int8: how far a weight moves, which ones do, where they lie; from files as from arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llm_jax.checkpoint.hf import export_hf, load_config, load_hf
from llm_jax.compress.quantize import quantize, quantized_shapes, read_weights, round_rows
from llm_jax.config import ModelConfig
from llm_jax.models import describe, init_params
from llm_jax.ops.quantized import QTensor, is_quantized
from llm_jax.sharding import make_mesh
from llm_jax.tree import flatten, num_bytes
from tests import tiny

CONFIG = ModelConfig(
    "llama", 256, 3, 64, num_heads=8, num_kv_heads=4, head_dim=8, mlp_dim=96, max_positions=64
)
MODEL = describe(CONFIG)
MESHES = ["tensor:8", "fsdp:4", "data:2,fsdp:2,tensor:2"]


def weight_of(leaf: QTensor) -> np.ndarray:
    """The weight [*lead, *out, C] in float64 that a `QTensor` stands for."""
    q = np.asarray(leaf.q if leaf.transposed else leaf.q.swapaxes(-1, -2), np.float64)
    values = q * np.asarray(leaf.scale, np.float64)[..., None]
    return values.reshape(*values.shape[:-2], *leaf.out, -1)


def same(a, b):
    """Two trees of parameters are equal, bit for bit, quantized ones in all that they say."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, make_mesh("data:1"), jax.random.key(0))


@given(arrays(np.float32, (3, 5), elements=st.floats(-(2.0**60), 2.0**60, width=32)))
def test_a_weight_moves_by_half_a_step_at_most(w):
    values, scale = round_rows(w, np)
    error = np.abs(w.astype(np.float64) - values * scale.astype(np.float64)[:, None])
    assert (error <= 0.5 * (1 + 1e-5) * scale[:, None].astype(np.float64)).all()
    assert (
        np.abs(values.astype(int)).max(axis=1) >= np.where(np.abs(w).max(axis=1) > 1e-30, 127, 0)
    ).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_numpy_and_jax_round_alike(dtype):
    w = jax.random.normal(jax.random.key(0), (64, 96)).astype(dtype).at[3].set(0)
    for ours, theirs in zip(round_rows(w, jnp), round_rows(np.asarray(w), np), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_matrices_are_rounded_and_nothing_else(params):
    rounded = flatten(quantize(params, MODEL, make_mesh("data:1")), is_leaf=is_quantized)
    matrices = {f"layers/attn/{name}" for name in ("wq", "wk", "wv", "wo")}
    matrices |= {f"layers/mlp/{name}" for name in ("gate", "up", "down")} | {"lm_head/weight"}
    flat = flatten(params)
    assert rounded.keys() == flat.keys()
    assert {path for path, leaf in rounded.items() if is_quantized(leaf)} == matrices
    for path, leaf in rounded.items():
        if path not in matrices:
            assert leaf is flat[path]
            continue
        wanted = np.asarray(flat[path], np.float64)
        steps = np.asarray(leaf.scale, np.float64).reshape(wanted.shape[:-1])[..., None]
        assert weight_of(leaf).shape == wanted.shape
        assert (np.abs(weight_of(leaf) - wanted) <= 0.5001 * steps).all()


def test_tied_embeddings_stay(params):
    tied = describe(dataclasses.replace(CONFIG, tie_embeddings=True))
    tree = {k: v for k, v in params.items() if k != "lm_head"}
    assert not is_quantized(quantize(tree, tied, make_mesh("data:1"))["embed"]["tokens"])


def test_memory_is_a_quarter(params):
    rounded = quantize(params, MODEL, make_mesh("data:1"))
    matrices = sum(
        leaf.q.size for leaf in jax.tree.leaves(rounded, is_leaf=is_quantized) if is_quantized(leaf)
    )
    scales = sum(
        leaf.scale.size for leaf in jax.tree.leaves(rounded, is_leaf=is_quantized) if is_quantized(leaf)
    )
    assert num_bytes(rounded) == num_bytes(params) - 3 * matrices + 4 * scales
    assert num_bytes(rounded["layers"]) < 0.3 * num_bytes(params["layers"])


@pytest.mark.parametrize(("mesh", "scheme"), [(mesh, "int8") for mesh in MESHES] + [("", "w8a8")])
def test_abstract_shapes_are_those_of_the_arrays(mesh, scheme, params):
    mesh = make_mesh(mesh)
    placed = jax.tree.map(jax.device_put, params, MODEL.shardings(mesh))
    rounded = quantize(placed, MODEL, mesh, scheme)
    abstract = quantized_shapes(MODEL, mesh, scheme)
    assert jax.tree.structure(abstract) == jax.tree.structure(rounded)
    for shape, array in zip(jax.tree.leaves(abstract), jax.tree.leaves(rounded), strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
        assert shape.sharding.is_equivalent_to(array.sharding, array.ndim)


def test_each_device_has_the_outputs_it_had(params):
    """A device's part of a weight in int8 is that of the weight: heads stay whole."""
    mesh = make_mesh("tensor:4,fsdp:2")
    placed = jax.tree.map(jax.device_put, params, MODEL.shardings(mesh))
    floats = flatten(placed)
    for path, leaf in flatten(quantize(placed, MODEL, mesh), is_leaf=is_quantized).items():
        if is_quantized(leaf):
            sizes = [np.prod(x.sharding.shard_shape(x.shape)) for x in (leaf.q, floats[path])]
            assert sizes[0] == sizes[1], path
            outputs = leaf.q.sharding.shard_shape(leaf.q.shape)[-2 if leaf.transposed else -1]
            assert outputs == leaf.scale.sharding.shard_shape(leaf.scale.shape)[-1]


@pytest.mark.parametrize("mesh", ["data:1", "data:2,fsdp:2,tensor:2"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "gpt2 untied" else pytest.mark.slow)
        for name in tiny.ALL
        if not name.startswith(("mixtral", "qwen3_moe"))  # are refused
    ],
)
def test_files_are_rounded_as_arrays_are(name, mesh, tmp_path):
    tiny.ALL[name].save(tmp_path)
    model, mesh = describe(load_config(tmp_path)), make_mesh(mesh)
    read = load_hf(tmp_path, model, mesh, scheme="int8")
    rounded = quantize(load_hf(tmp_path, model, mesh), model, mesh)
    same(read, rounded)
    for ours, theirs in zip(jax.tree.leaves(read), jax.tree.leaves(rounded), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)


def test_what_is_not_finite_is_refused(tmp_path):
    model = tiny.DECODERS["llama"].build()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers/mlp/up \(.*\) has weights that are not finite"):
        load_hf(tmp_path, describe(load_config(tmp_path)), make_mesh("data:1"), scheme="int8")


def test_names_of_weights(params, tmp_path):
    assert read_weights("") == ("", "") and read_weights("", "float32") == ("float32", "")
    assert read_weights("bfloat16", "float32") == ("bfloat16", "")
    assert read_weights("int8", "float32") == ("float32", "int8")
    with pytest.raises(ValueError, match="weights='int4': expected one of .*'int8', 'w8a8'"):
        read_weights("int4")
    with pytest.raises(ValueError, match="weights='': expected one of"):
        quantize(params, MODEL, make_mesh("data:1"), "")
    with pytest.raises(ValueError, match="params are quantized"):
        export_hf(tmp_path / "out", MODEL, quantize(params, MODEL, make_mesh("data:1")))


def test_experts_are_refused_by_name():
    config = dataclasses.replace(CONFIG, family="mixtral", num_experts=4, experts_per_token=2)
    with pytest.raises(ValueError, match="weights='int8': the experts of a mixture"):
        quantized_shapes(describe(config), make_mesh("tensor:8"))
