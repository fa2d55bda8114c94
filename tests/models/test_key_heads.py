"""Key heads repeated for a tensor axis that does not divide them: each device has those that its queries
read and no others, and what is served says what one device says.
"""

import dataclasses
import logging

import jax
import numpy as np
import pytest

from llm_jax import LLM, SamplingParams
from llm_jax.cache import init_cache
from llm_jax.checkpoint.hf import export_hf, load_config, load_hf
from llm_jax.checkpoint.peft import export_peft
from llm_jax.compress.quantize import quantize, quantized_shapes
from llm_jax.config import EngineConfig, LoraConfig, ModelConfig
from llm_jax.data.tokenizer import ByteTokenizer
from llm_jax.engine.engine import Engine
from llm_jax.infer.steps import make_prefill
from llm_jax.infer.taps import run_with_taps
from llm_jax.models import describe, init_params
from llm_jax.models.key_heads import own, repeat_key_heads, served
from llm_jax.models.lora import LoraModel
from llm_jax.ops.linear import LowRank
from llm_jax.ops.quantized import QTensor, is_quantized
from llm_jax.ops.taps import Patch, Taps
from llm_jax.sharding import key_heads, make_mesh, placed
from llm_jax.tree import flatten, unflatten
from tests import tiny

SLOW = pytest.mark.slow
TWO = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2}
# One key head on a device; two, which may be the same one; split over fsdp as well.
SPLITS = [("tensor:8", 8, 2), ("tensor:6", 12, 4), ("fsdp:2,tensor:4", 8, 2)]
PROMPTS = [[5, 9, 33], [60, 50, 40, 30, 20] * 4, [7]]
ASKED = SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True, logprobs=0)
SIZES = {"max_rows": 4, "token_budget": 32, "max_length": 48, "page_size": 8, "compile_ahead": False}
WITH_HEADS = {f"layers/attn/{name}" for name in ("wk", "wv", "bk", "bv")}


def config(heads=8, kv_heads=2, **changes):
    sizes = {"embed_dim": 48, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": 8, "mlp_dim": 96}
    return ModelConfig("qwen2", 97, 2, max_positions=64, qkv_bias=True, **(sizes | changes))


def saved(directory, name="qwen2", **changes):
    """A tiny model with 8 heads and 2 key heads, and a tokenizer, on disk."""
    model = dataclasses.replace(
        tiny.DECODERS[name], settings=tiny.DECODERS[name].settings | TWO | changes
    )
    model.save_for(directory, ByteTokenizer())
    return directory


def drawn(model, mesh, seed=0):
    """Parameters none of which is constant."""
    params = flatten(init_params(model, mesh, jax.random.key(seed)))
    noise = lambda i, x: x + 0.3 * jax.random.normal(jax.random.key(i), x.shape, x.dtype)  # noqa: E731
    return unflatten(
        {path: noise(i, x) if x.ndim < 4 else x for i, (path, x) in enumerate(params.items())}
    )


def same(a, b):
    """Two trees of parameters are equal in all that they say, and where it lies."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for ours, theirs in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)


@pytest.fixture(autouse=True)
def devices():
    if jax.device_count() < 8:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")


@pytest.mark.parametrize("mesh, heads, kv_heads", SPLITS)
def test_each_device_has_the_key_heads_that_its_queries_read(mesh, heads, kv_heads):
    model, mesh = describe(config(heads, kv_heads)), make_mesh(mesh)
    params = drawn(model, mesh)
    flat, held = flatten(params), flatten(repeat_key_heads(params, model, mesh))
    before = {path: np.asarray(x) for path, x in flat.items()}
    assert list(held) == list(flat)
    assert {path for path in flat if held[path] is not flat[path]} == WITH_HEADS
    queries = heads // mesh.shape["tensor"]  # of a device
    for path in WITH_HEADS:
        each = held[path].shape[1] // mesh.shape["tensor"]
        for shard in held[path].addressable_shards:
            first = shard.index[1].start // each * queries
            for n in range(queries):
                wanted = before[path][:, (first + n) // (heads // kv_heads)]
                got = shard.data[:, n // (queries // each)]
                np.testing.assert_array_equal(got, wanted[shard.index[0], *shard.index[2:]])
    for path, x in flat.items():
        np.testing.assert_array_equal(x, before[path], "what was given is there still")


@pytest.mark.parametrize("mesh, heads", [("tensor:2", 8), ("tensor:8", 6), ("data:8", 8)])
def test_heads_that_divide_and_queries_that_do_not_stay(mesh, heads):
    model, mesh = describe(config(heads)), make_mesh(mesh)
    params = init_params(model, mesh, jax.random.key(0))
    assert served(model, mesh) is own(model) is model
    assert repeat_key_heads(params, model, mesh) is params


@pytest.mark.parametrize("mesh, heads, kv_heads", SPLITS)
@pytest.mark.parametrize("scheme", ["", "int8", "w8a8"])
def test_files_are_read_as_arrays_are_repeated(tmp_path, mesh, heads, kv_heads, scheme):
    sizes = {"hidden_size": 8 * heads, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    saved(tmp_path, **sizes)
    model, mesh = describe(load_config(tmp_path)), make_mesh(mesh)
    whole = load_hf(tmp_path, model, mesh)
    read = load_hf(tmp_path, served(model, mesh), mesh, scheme=scheme)
    shapes = placed(served(model, mesh).shapes, model.axes, mesh)
    if scheme:
        shapes = quantized_shapes(served(model, mesh), mesh, scheme)
        same(read, repeat_key_heads(quantize(whole, model, mesh, scheme), model, mesh))
        same(read, quantize(repeat_key_heads(whole, model, mesh), served(model, mesh), mesh, scheme))
    else:
        same(read, repeat_key_heads(whole, model, mesh))
    for array, shape in zip(jax.tree.leaves(read), jax.tree.leaves(shapes), strict=True):
        assert (array.shape, array.dtype) == (shape.shape, shape.dtype)
        assert shape.sharding.is_equivalent_to(array.sharding, array.ndim)


def test_a_device_holds_its_own_part_and_nothing_is_kept_whole(tmp_path, caplog, monkeypatch):
    saved(tmp_path)
    monkeypatch.setattr("llm_jax.sharding._reported", set())
    with caplog.at_level(logging.WARNING):
        for weights in ("", "int8"):
            attention = LLM(tmp_path, mesh="tensor:8", weights=weights).params["layers"]["attn"]
            for name in ("wk", "wv"):
                leaf = attention[name].q if is_quantized(attention[name]) else attention[name]
                assert {shard.data.size for shard in leaf.addressable_shards} == {2 * 64 * 8}  # L C H
    assert not [r for r in caplog.records if "kv_heads" in r.getMessage()]


def agree(outputs, wanted, atol=2e-5):
    for ours, theirs in zip(outputs, wanted, strict=True):
        assert ours.token_ids == theirs.token_ids
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=atol)


@pytest.mark.parametrize(
    "name, weights",
    [
        ("qwen3", "int8"),
        *(pytest.param(*x, marks=SLOW) for x in (("qwen3", ""), ("qwen2", ""), ("qwen2", "int8"))),
    ],
)
def test_eight_devices_say_what_one_says(tmp_path, name, weights):
    """Of two key heads, with a bias (qwen2) or a norm (qwen3); by fixed batches, beams and engine."""
    saved(tmp_path, name)
    one, eight = (LLM(tmp_path, weights=weights, mesh=mesh) for mesh in ("", "tensor:8"))
    wanted = one.generate(PROMPTS, ASKED)
    agree(eight.generate(PROMPTS, ASKED), wanted)
    agree(Engine(eight, EngineConfig(**SIZES)).generate(PROMPTS, ASKED), wanted, 1e-4)
    beams = [llm.beam_search(PROMPTS[:1], ASKED, num_beams=3, num_return=2) for llm in (one, eight)]
    agree(*beams)
    texts = [output.prompt_ids + output.token_ids for output in wanted]
    for strict in (False, True):
        for ours, theirs in zip(*(x.score(texts, strict=strict) for x in (eight, one)), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


@SLOW
def test_several_heads_of_a_device_that_are_the_same(tmp_path):
    """4 key heads on tensor:6: the first device of six has head 0 twice, the second heads 0 and 1."""
    saved(tmp_path, hidden_size=96, num_attention_heads=12, num_key_value_heads=4)
    one, six = (LLM(tmp_path, mesh=mesh) for mesh in ("", "tensor:6"))
    wanted = one.generate(PROMPTS, ASKED)
    agree(six.generate(PROMPTS, ASKED), wanted)
    agree(Engine(six, EngineConfig(**SIZES)).generate(PROMPTS, ASKED), wanted, 1e-4)


@pytest.mark.parametrize("scheme", ["", pytest.param("int8", marks=SLOW)])
def test_adapters_and_a_drafting_model(tmp_path, scheme):
    """Served from parameters that are being trained, with an adapter on wk and wv, and drafts of another
    model whose one key head is on all devices.
    """
    model, mesh, one = describe(config()), make_mesh("tensor:8"), make_mesh("")
    params = drawn(model, one)
    lora = LoraModel(model, LoraConfig(rank=4, alpha=8.0, targets=("attn/w[kv]$", "mlp/up$")))
    adapters = flatten(lora.init(params, one, jax.random.key(1)))
    rng = np.random.default_rng(0)
    adapters = unflatten(
        {p: rng.normal(0, 0.3, x.shape).astype(np.float32) for p, x in adapters.items()}
    )
    settings = {"adapters": 2, "adapter_rank": 4}

    def say(mesh, adapter, drafter=None, **changes):
        on = jax.tree.map(jax.device_put, params, model.shardings(mesh))
        on = quantize(on, model, mesh, scheme) if scheme else on
        engine = Engine(
            LLM.from_params(model, on, None, mesh=mesh),
            EngineConfig(**SIZES, **settings, **changes),
            drafter=drafter,
        )
        engine.load_adapter("a", adapter)
        names = [None, "a", "a"]
        return engine, engine.generate(PROMPTS, ASKED, adapter=names)

    wanted = say(one, lora.change(adapters))[1]
    small = describe(config(8, 1, embed_dim=32))
    drafter = LLM.from_params(small, init_params(small, mesh, jax.random.key(5)), None, mesh=mesh)
    directory = export_peft(tmp_path / "adapter", lora, adapters)
    engine, outputs = say(mesh, directory, drafter, speculation="draft_model", draft_tokens=2)
    agree(outputs, wanted, 1e-4)
    outputs = say(mesh, lora.change(adapters))[1]
    agree(outputs, wanted, 1e-4)
    assert engine.runner.adapters.swaps == 1
    assert drafter.params["layers"]["attn"]["bk"].shape == (2, 8, 8)
    if not scheme:
        merged = LLM.from_params(model, lora.merge(adapters, params), None).generate(PROMPTS[1:], ASKED)
        agree(outputs[1:], merged, 1e-4)


def test_taps_show_the_heads_of_the_model():
    """What is recorded and patched at keys and values has each head once, on any mesh."""
    model, mesh, one = describe(config()), make_mesh("tensor:8"), make_mesh("")
    params = drawn(model, one)
    value = np.random.default_rng(0).normal(0, 2, (2, 8))
    patches = (Patch("k", value, 0, 3), Patch("v", value, 1, mode="add"))
    taps, tokens, found = Taps(("q", "k", "v", "attn_probs", "final"), None, patches), PROMPTS[1], []
    for on in (one, mesh):
        placed_params = jax.tree.map(jax.device_put, params, model.shardings(on))
        llm = LLM.from_params(model, placed_params, None, mesh=on)
        (output,) = Engine(llm, EngineConfig(**SIZES)).generate([tokens], ASKED, taps=taps)
        with jax.set_mesh(on):
            whole = run_with_taps(llm.model, llm.params, [tokens + output.token_ids[:-1]], taps)[1]
        found += [output.taps, {name: x if name == "final" else x[:, 0] for name, x in whole.items()}]
        found[-1]["final"] = whole["final"][0]
    assert found[0]["k"].shape == (2, 27, 2, 8)
    for others in found[1:]:
        assert others.keys() == found[0].keys()
        for point, wanted in found[0].items():
            np.testing.assert_allclose(others[point], wanted, atol=5e-5, err_msg=point)


def test_what_cannot_be_is_refused(tmp_path):
    model, mesh = describe(config()), make_mesh("tensor:8")
    params = drawn(model, mesh)
    llm = LLM.from_params(model, params, None, mesh=mesh)
    assert llm.model.config == model.config and own(llm.model).shapes == model.shapes
    again = LLM.from_params(llm.model, llm.params, None, mesh=mesh)
    assert again.params is llm.params and again.model is llm.model
    with pytest.raises(ValueError, match="params have key heads repeated for a mesh"):
        export_hf(tmp_path, llm.model, llm.params)
    with pytest.raises(ValueError, match="params have 8 key heads at layers/attn/bk, .* expected 4"):
        LLM.from_params(llm.model, llm.params, None, mesh="tensor:4")
    wk = params["layers"]["attn"]["wk"]
    low_rank = flatten(params) | {"layers/attn/wk": LowRank(wk, wk, wk, 1.0)}
    with pytest.raises(ValueError, match="params have a LowRank at layers/attn/wk"):
        repeat_key_heads(unflatten(low_rank), model, mesh)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="keys of 2 heads, a cache .* has 8: take"):
        cache = init_cache(model.config, 1, 16, mesh)
        make_prefill(model)(params, cache, np.ones((1, 4), np.int32), np.array([4], np.int32))


@pytest.mark.parametrize("tensor", [1, 2, 3, 4, 6, 8])
def test_heads_divide_over_the_shards_and_group_the_queries(tensor):
    heads = key_heads(24, 4, make_mesh({"tensor": tensor}))
    assert heads % tensor == 0 and heads % 4 == 0 and 24 % heads == 0
    assert key_heads(5, 1, make_mesh({"tensor": tensor})) == 1 if tensor > 1 else 1


def test_a_quantized_weight_turns_where_its_kernel_no_longer_fits(monkeypatch):
    """On a TPU q is [C, O] where a device has whole tiles of 128 columns: two heads of 64, not one."""
    model, mesh = describe(config(8, 2, head_dim=64)), make_mesh("tensor:8")
    like_a_tpu = lambda w, mesh: w.scale.shape[-1] // (8 if w.out[0] == 8 else 1) % 128 == 0  # noqa: E731
    for room in ("compress.quantize", "models.key_heads"):
        monkeypatch.setattr(f"llm_jax.{room}.lies_for_kernel", like_a_tpu)
    params = drawn(model, mesh)
    rounded = quantize(params, model, mesh)
    assert not rounded["layers"]["attn"]["wk"].transposed
    found = repeat_key_heads(rounded, model, mesh)
    wk = found["layers"]["attn"]["wk"]
    assert isinstance(wk, QTensor) and wk.transposed
    same(found, quantize(repeat_key_heads(params, model, mesh), served(model, mesh), mesh))
