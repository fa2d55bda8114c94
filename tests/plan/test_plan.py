"""Quotes: memory against real arrays, presets against published sizes, meshes against enumeration."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from llm_jax.cache.paged import init_paged, pool_windows
from llm_jax.config import EngineConfig, OptimConfig
from llm_jax.engine.engine import Engine
from llm_jax.infer.llm import LLM
from llm_jax.models import describe, init_params
from llm_jax.models.key_heads import repeat_key_heads
from llm_jax.plan import report
from llm_jax.plan.export_worker import engine_programs
from llm_jax.plan.kernels import Traffic, kernel_cost
from llm_jax.plan.quote import Quote, StepQuote, arrays_of, conclude, quote
from llm_jax.plan.search import candidates, meshes, pareto, rank
from llm_jax.plan.steps import abstract_mesh, device_bytes, serving_arrays, training_arrays
from llm_jax.plan.workload import Workload, chips, devices, model_config, presets, price_of
from llm_jax.sharding import data_shards, make_mesh
from llm_jax.tpu.compile import CompileError
from llm_jax.tpu.hlo import Array, Operation
from llm_jax.train.optim import make_optimizer
from llm_jax.train.state import init_state
from llm_jax.tree import num_elements

TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return str(tmp_path)


def fullest(tree) -> int:
    """Bytes of real arrays on the device that has most."""
    totals = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            totals[shard.device] += shard.data.nbytes
    return max(totals.values())


@pytest.mark.parametrize("mesh", ["data:8", "tensor:8", "data:2,tensor:4", "fsdp:4,tensor:2"])
@pytest.mark.parametrize("cache", ["bf16", "int8"])
def test_memory_of_serving_is_that_of_real_arrays(tiny, mesh, cache):
    work = Workload(tiny, batch=16, context=100, cache=cache, page_size=16)
    model, params, pages = serving_arrays(work, abstract_mesh(mesh, 8))
    on = make_mesh(mesh)
    described = describe(work.config)
    real = init_params(described, on, jax.random.key(0))
    assert device_bytes(params) == fullest(repeat_key_heads(real, described, on))
    count = (work.rows(data_shards(on)) * work.pages,) * len(pool_windows(work.config))
    kept = {"bf16": "bfloat16", "int8": "int8"}[cache]
    assert device_bytes(pages) == fullest(init_paged(model.config, count, 16, on, kept))


@pytest.mark.parametrize("mesh", ["fsdp:8", "data:2,fsdp:2,tensor:2"])
def test_memory_of_training_is_that_of_real_arrays(tiny, mesh):
    work = Workload(tiny, batch=8, context=64)
    model, _, state = training_arrays(work, abstract_mesh(mesh, 8))
    optimizer = make_optimizer(OptimConfig(learning_rate=1e-3), model, 10)
    real = init_state(model, optimizer, make_mesh(mesh), jax.random.key(0))
    assert device_bytes(state) == fullest(real)


@pytest.mark.parametrize(
    ("name", "billions"),  # as the models' cards and reports give them
    [
        ("llama3-8b", 8.03),
        ("llama3.1-70b", 70.55),
        ("llama3.1-405b", 405.85),
        ("llama3.2-1b", 1.236),
        ("qwen3-0.6b", 0.596),
        ("qwen3-8b", 8.191),
        ("qwen3-32b", 32.76),
        ("gemma3-27b", 27.01),
        ("gpt2", 0.1244),
        ("gpt2-xl", 1.5576),
        ("mistral-7b", 7.242),
    ],
)
def test_presets_have_the_published_numbers_of_parameters(name, billions):
    shapes = describe(model_config(name)).shapes
    assert sum(map(num_elements, jax.tree.leaves(shapes))) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_every_preset_is_a_model():
    assert len(presets()) >= 20
    for name in presets():
        Workload(name, context=128)


def test_slices():
    assert (chips("v5e:4x4"), devices("v5e:4x4")) == (16, 16)
    assert (chips("tpu7x:2x2x1"), devices("tpu7x:2x2x1")) == (4, 8)
    assert price_of("v5e:1x1") == 1.2
    assert price_of("tpu7x:2x2x1") is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Workload("llama3.1-8bb"), "did you mean llama3.1-8b"),
        (lambda: Workload("llama3-8b", context=9000), "context=9000: expected at most the model's 8192"),
        (lambda: Workload("llama3-8b", weights="int3"), "weights="),
        (lambda: Workload("llama3-8b", batch=0), "batch=0"),
        (lambda: Workload("gpt2", context=64, optimizer="adamm"), "optimizer='adamm'"),
        (lambda: Workload("gpt2", context=64, remat="all"), "remat='all'"),
        (lambda: chips("v5e"), "expected a shape"),
        (lambda: chips("v9:2x2"), "no TPU generation"),
        (lambda: quote(Workload("gpt2", context=64), "v5e:2x2", "tensor:2"), "2 devices.* 4"),
        (lambda: quote(Workload("gpt2", context=64), "v5e:2x2", "tenser:4"), "no axis 'tenser'"),
        (lambda: quote(Workload("gpt2", context=64), "v5e:2x4", "tensor:8"), "num_heads=12"),
    ],
)
def test_what_cannot_be_quoted_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_meshes_are_all_factorizations():
    found = meshes("v5e:4x4", ("data", "fsdp", "tensor"))
    assert len(found) == len(set(found))
    numbers = [tuple(sizes) for sizes in itertools.product((1, 2, 4, 8, 16), repeat=3)]
    assert len(found) == sum(math.prod(n) == 16 for n in numbers)
    assert all(abstract_mesh(mesh, 16).size == 16 for mesh in found)
    assert abstract_mesh("data:2,tensor:-1", 16).shape["tensor"] == 8


@pytest.mark.parametrize(
    ("given", "unread"),
    [
        (["--batches=1,2"], "--batches"),
        (["--optimizer=lion"], "--optimizer"),
        (["--sweep=x", "--steps=train"], "--steps"),
        (["--export_cache=x"], "--export_cache"),
    ],
)
def test_flags_that_nothing_reads_are_refused(given, unread):
    script = Path(__file__).resolve().parents[2] / "scripts" / "plan.py"
    done = subprocess.run(
        [sys.executable, script, "--model=gpt2", "--context=64", *given], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"plan.py: {unread}" in done.stderr


def test_a_host_that_is_slower_than_the_devices_is_the_limit():
    step = StepQuote(
        "decode", 1e-3, "memory", {"memory": 1e-3}, 1000, 0.1, 0.9, {}, 1, 1, 1, 1.0, (), ()
    )
    work = Workload("gpt2", batch=1000, context=64)
    found = conclude(work, "v5e:1x1", "data:1", {"weights": 1}, {"decode": step}, "")
    assert found.limit == "host"
    assert found.decode_step_s == pytest.approx(0.4e-3 + 1000 * 7e-6)


def test_only_what_can_fit_is_compiled():
    good, bad = candidates(Workload("llama3.1-70b", batch=16), "v6e:4x4", ("decode",))
    reasons = dict(bad)
    assert good == ["tensor:16", "data:2,tensor:8"]
    assert "does not fit" in reasons["data:4,tensor:4"]
    good, bad = candidates(Workload("gpt2", batch=6, context=64), "v5e:2x4", ("decode",))
    assert dict(bad)["tensor:8"] == "tensor=8 does not divide num_heads=12"
    assert dict(bad)["data:4,tensor:2"] == "batch=6 is no multiple of its 4 data shards"


def test_what_does_not_fit_is_said_without_compiling():
    found = quote(Workload("llama3.1-405b", batch=8), "v5e:4x4", "tensor:16")
    assert not found.fits
    assert found.free_bytes < 0
    assert "weights" in found.advice
    assert not found.steps
    assert found.free_bytes == found.hbm_limit - sum(found.hbm_bytes.values())
    assert "DOES NOT FIT" in report.text(found)


def fake(name: int, latency: float, throughput: float) -> Quote:
    work = Workload("gpt2", batch=name, context=64)
    speed = {"tokens_per_s_per_sequence": 1 / latency, "tokens_per_s_per_chip": throughput}
    return Quote(work, "v5e:1x1", "data:1", True, {}, 1, 1, {}, decode_step_s=latency, **speed)


@hypothesis.given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(points):
    quotes = [fake(i + 1, float(a), float(b)) for i, (a, b) in enumerate(points)]
    front = {(q.decode_step_s, q.tokens_per_s_per_chip) for q in pareto(quotes)}
    beaten = lambda p: any(q[0] <= p[0] and q[1] >= p[1] and q != p for q in points)  # noqa: E731
    assert front == {(float(a), float(b)) for a, b in points if not beaten((a, b))}


def test_ranks_and_tables(tmp_path):
    slow, fast = fake(1, 2.0, 5.0), fake(2, 1.0, 9.0)
    slow, fast = (dataclasses.replace(q, tokens_per_s=q.tokens_per_s_per_chip) for q in (slow, fast))
    big = dataclasses.replace(fast, fits=False)
    assert sorted([big, slow, fast], key=rank) == [fast, slow, big]
    shown = report.table([fast, slow], [("tensor:8", "why")])
    assert "not compiled: tensor:8: why" in shown
    report.write_sweep([slow, fast], tmp_path / "out" / "sweep")
    lines = (tmp_path / "out" / "sweep.csv").read_text().splitlines()
    assert lines[0].startswith("batch,topology,mesh,fits")
    assert [line.rsplit(",", 1)[1] for line in lines[1:]] == ["False", "True"]
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        ("Ran out of memory in memory space hbm. Exceeded hbm capacity by 4.35G.", "by 4.35G"),
        (
            "E1000: CompileTimeHbmOom: the total memory required for HLO temporaries "
            "(164.54G) exceeds available HBM (95.73G)",
            "alone are 164.54 GiB",
        ),
    ],
)
def test_what_the_compiler_refuses_for_want_of_memory_does_not_fit(monkeypatch, refused, said):
    def compile_for(*_, **__):
        raise CompileError(refused, "")

    monkeypatch.setattr("llm_jax.plan.quote.compile_for", compile_for)
    found = quote(Workload("gpt2", context=64), "v5e:1x1", "data:1", ("decode",))
    assert not found.fits
    assert said in found.advice


def operation(kernel: str, given: str, made: str = "") -> Operation:
    def read(text):
        parts = (part.split(":") for part in text.split())
        return tuple(Array(t, tuple(map(int, dims.split("x"))), 0) for t, dims in parts)

    return Operation(kernel, "custom-call", kernel=kernel, given=read(given), made=read(made))


def test_costs_of_kernels_are_arithmetic():
    # 32 sequences of 4,096 tokens, 8 key heads of 128: 537 MB of keys and values in bfloat16.
    traffic = Traffic(4096, 2048.0, (0,))
    pages = "bf16:32x1024x2x128x1024"
    cost = kernel_cost(
        operation("paged_decode", f"s32:3 bf16:32x32x128 bf16:32x2x1024 {pages}"), "v5e", traffic
    )
    assert cost.hbm_bytes == 32 * 4096 * 2 * 8 * 128 * 2
    assert cost.flops == 4 * 32 * 4096 * 32 * 128
    # A causal prompt of 4,096 tokens: 137.4 GFLOP.
    given = "bf16:1x4096x4096 bf16:1x8x4096x128 bf16:1x8x128x4096"
    cost = kernel_cost(operation("flash_attention", given, "bf16:1x4096x4096"), "v6e", traffic)
    assert cost.flops == pytest.approx(137.4e9, rel=1e-3)
    assert cost.peak_share == 0.44
    # Backward: 5 products for the forward pass's 2, or 4 and 3 in two kernels.
    rows, gradients = "f32:1x8x4x4096 f32:1x8x4x4096", "bf16:1x8x4096x128 bf16:1x8x4096x128"
    given = f"bf16:1x8x128x4096 bf16:1x4096x4096 {gradients} bf16:1x4096x4096 {rows}"
    for name, made, products in (
        ("flash_attention_keys", f"{gradients} bf16:1x4096x4096", 5),
        ("flash_attention_keys", gradients, 4),
        ("flash_attention_queries", "bf16:1x4096x4096", 3),
    ):
        cost = kernel_cost(operation(name, given, made), "v6e", traffic)
        assert cost.flops == pytest.approx(137.4e9 / 2 * products, rel=1e-3)
    # A matrix of 4096 x 14336 bytes out of 32.
    given = "s32:1 bf16:16x4096 s8:32x4096x14336 f32:1x14336"
    cost = kernel_cost(operation("quantized_matmul", given, "bf16:16x14336"), "v5e", traffic)
    assert cost.hbm_bytes == 4096 * 14336 + 2 * 16 * (4096 + 14336)
    assert cost.flops == 2 * 16 * 4096 * 14336
    # Rows of int8 too: units that multiply integers do so twice as fast.
    given = "s32:1 s8:16x4096 f32:16x1 s8:32x4096x14336 f32:1x14336"
    cost = kernel_cost(operation("quantized_matmul", given, "bf16:16x14336"), "v5e", traffic)
    assert cost.flops == 2 * 16 * 4096 * 14336
    assert cost.peak_share == 1.95
    # 64 tokens choose 2 of 8 experts, of which a device has 2, in the fourth of 32 layers.
    mixture = dataclasses.replace(traffic, experts=8, chosen=2)
    given = "s32:2 s32:1 bf16:128x4096 bf16:64x14336x4096"
    cost = kernel_cost(operation("grouped_matmul", given, "bf16:128x14336"), "v6e", mixture)
    assert cost.flops == 2 * 32 * 4096 * 14336
    assert cost.hbm_bytes == pytest.approx(2 * 2 * 4096 * 14336 + 32 * 2 * (4096 + 14336))
    # Two tokens touch 1 - 0.75 ** 2 of them.
    given = "s32:2 s32:1 bf16:4x4096 bf16:64x14336x4096"
    cost = kernel_cost(operation("grouped_matmul", given, "bf16:4x14336"), "v6e", mixture)
    assert cost.hbm_bytes == 0.4375 * 2 * 2 * 4096 * 14336 + 2 * (4096 + 14336)
    cost = kernel_cost(
        operation("grouped_matmul_weights", "bf16:128x4096 bf16:128x14336 s32:2", "f32:2x14336x4096"),
        "v6e",
        mixture,
    )
    assert cost.flops == 2 * 32 * 4096 * 14336
    assert kernel_cost(operation("another", "f32:8"), "v5e", traffic) is None


def test_windows_count_by_their_layers():
    traffic = Traffic(4096, 2048.0, (1024, 0))
    assert traffic.seen(4096) == (1024 + 4096) / 2
    assert traffic.seen(100) == 100


def test_arrays_of_names_what_there_is():
    found = arrays_of(Workload("gpt2", context=64), "v5e:1x1", "data:1", ("train", "decode"))
    assert set(found) == {"weights", "optimizer", "cache"}
    assert found["optimizer"] == pytest.approx(2 * found["weights"], rel=1e-3)


@pytest.mark.slow
def test_exported_programs_are_those_of_an_engine(tiny, tmp_path):
    """An engine finds every program in a cache that was filled from shapes alone."""
    work = Workload(tiny, batch=2, context=32, page_size=16, prefill_tokens=16)
    mesh = make_mesh("data:1,tensor:8")  # more than the 4 key heads
    config = EngineConfig(
        max_rows=2, token_budget=16, max_length=32, page_size=16, pages=(5,), cache_dtype="bfloat16"
    )
    kept = jax.config.jax_compilation_cache_dir
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    entries = lambda: {path.name for path in tmp_path.glob("*-cache")}  # noqa: E731
    try:
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        engine_programs(work, mesh, config).compile_all()
        exported = entries()
        params = init_params(describe(work.config), mesh, jax.random.key(0))
        before = entries()
        Engine(LLM.from_params(describe(work.config), params, None, mesh=mesh), config)
        made = {name for name in entries() - before if "forward" in name or "choose" in name}
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
        compilation_cache.reset_cache()
    assert len([name for name in exported if "forward" in name]) >= 3
    assert made == set()
