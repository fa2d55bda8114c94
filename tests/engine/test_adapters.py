"""Adapters by request, in one batch: what each gets is what the model with that adapter merged makes."""

import contextlib
import dataclasses
import io
import json
import random

import jax
import numpy as np
import pytest
import torch
import transformers

from llm_jax import LLM, SamplingParams
from llm_jax.checkpoint.hf import load_config, load_hf
from llm_jax.checkpoint.peft import export_peft, load_peft
from llm_jax.checkpoint.tensor_file import TensorFile, write_tensors
from llm_jax.config import EngineConfig, LoraConfig
from llm_jax.engine.adapters import Places
from llm_jax.engine.engine import Engine
from llm_jax.engine.pages import PoolSpec
from llm_jax.engine.plan import SchedulerConfig
from llm_jax.engine.request import Request
from llm_jax.engine.scheduler import Scheduler
from llm_jax.infer.llm import demo_model
from llm_jax.models import describe, init_params
from llm_jax.models.lora import LoraModel
from llm_jax.sharding import make_mesh
from llm_jax.tree import flatten, unflatten
from tests import tiny

SIZES = {"max_rows": 4, "token_budget": 32, "max_length": 96, "page_size": 16, "compile_ahead": False}
SIZES |= {"adapters": 3, "adapter_rank": 8}
PROMPTS = [[5, 6, 7], [60, 50, 40, 30, 20] * 4, [9]]
ASKED = SamplingParams(max_new_tokens=10, temperature=0, logprobs=0)
LORAS = {  # of different ranks, scales and targets
    "poet": LoraConfig(rank=8, alpha=16.0, targets=("attn/", "mlp/")),
    "coder": LoraConfig(rank=3, alpha=9.0, targets=("attn/w[qv]$",)),
    "judge": LoraConfig(rank=5, alpha=5.0, targets=("attn/wo$", "mlp/down$")),
}
NAMES = [None, *LORAS]
MODEL = describe(dataclasses.replace(load_config(demo_model()), num_layers=2, vocab_size=97))


@pytest.fixture(scope="module")
def params():
    """Of a small random model."""
    return init_params(MODEL, make_mesh("data:1"), jax.random.key(0))


@pytest.fixture(scope="module")
def llm(params):
    return LLM.from_params(MODEL, params, None)


def drawn(lora, params, seed, std=0.3):
    """Adapters with every array drawn, so that b is not zero."""
    adapters = flatten(lora.init(params, make_mesh("data:1"), jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    return unflatten({p: rng.normal(0, std, x.shape).astype(np.float32) for p, x in adapters.items()})


@pytest.fixture(scope="module")
def loras(llm, params):
    """{name: (LoraModel, adapters, an LLM with it merged)}, and None: the model as it is."""
    found = {None: (None, None, llm)}
    for seed, (name, config) in enumerate(LORAS.items()):
        lora = LoraModel(MODEL, config)
        adapters = drawn(lora, params, seed)
        merged = LLM.from_params(MODEL, lora.merge(adapters, params), None)
        merged.compiled = llm.compiled
        found[name] = lora, adapters, merged
    return found


@pytest.fixture(scope="module")
def expected(loras):
    """{(adapter, index of the prompt): Output} of `LLM.generate`."""
    found = {}
    for name, (_, _, merged) in loras.items():
        found |= {(name, i): output for i, output in enumerate(merged.generate(PROMPTS, ASKED))}
    tokens = {name: tuple(found[name, 0].token_ids) for name in loras}
    assert len(set(tokens.values())) == len(tokens), "each adapter says something else"
    return found


def engine(llm, loras, names=tuple(LORAS), **changes):
    serving = Engine(llm, EngineConfig(**(SIZES | changes)))
    for name in names:
        lora, adapters, _ = loras[name]
        serving.load_adapter(name, lora.change(adapters))
    return serving


def agree(output, wanted):
    assert output.token_ids == wanted.token_ids
    np.testing.assert_allclose(output.logprobs, wanted.logprobs, atol=1e-4)


def serve(serving, expected, names=NAMES):
    """Ask every prompt of every adapter, all at once, and compare."""
    asked = [(name, i) for i in range(len(PROMPTS)) for name in names]
    outputs = serving.generate(
        [PROMPTS[i] for _, i in asked], ASKED, adapter=[name for name, _ in asked]
    )
    for output, key in zip(outputs, asked, strict=True):
        agree(output, expected[key])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapters": 1},
        pytest.param({"speculation": "prompt_lookup", "draft_tokens": 3}, marks=pytest.mark.slow),
        pytest.param({"pages": (8,), "max_length": 80, "page_size": 8}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: "-".join(changes) or "default",
)
def test_a_batch_of_several_adapters(llm, loras, expected, changes):
    serving = engine(llm, loras, **changes)
    serve(serving, expected)
    assert serving.runner.adapters.swaps >= 3, "each was brought to the device"
    if "pages" in changes:
        assert serving.schedulers[0].statistics.preemptions > 0


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data:2", "data:2,tensor:2"])
def test_meshes(loras, expected, mesh):
    params = init_params(MODEL, make_mesh(mesh), jax.random.key(0))
    rows = 1 if mesh == "data:2" else 2
    serving = engine(LLM.from_params(MODEL, params, None, mesh=mesh), loras, max_rows=rows)
    serve(serving, expected)
    assert all(s.statistics.requests > 0 for s in serving.schedulers)


@pytest.mark.slow
def test_searches_of_several_adapters(llm, loras):
    serving, options = engine(llm, loras, max_beams=3), {"num_beams": 3, "num_return": 2}
    outputs = serving.beam_search(PROMPTS[:1] * 4, ASKED, adapter=NAMES, **options)
    for i, name in enumerate(NAMES):
        wanted = loras[name][2].beam_search(PROMPTS[:1], ASKED, **options)
        for output, other in zip(outputs[2 * i : 2 * i + 2], wanted, strict=True):
            agree(output, other)


def test_loading_and_unloading_compile_nothing(llm, loras, expected):
    serving = engine(llm, loras, ["poet"], compile_ahead=True, adapters=1, max_rows=1)
    serve(serving, expected, [None, "poet"])
    compiled = []
    listen = lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for name in ("coder", "judge"):
            lora, adapters, _ = loras[name]
            serving.load_adapter(name, lora.change(adapters))
        serve(serving, expected)
        serving.unload_adapter("poet")
        lora, adapters, _ = loras["coder"]
        serving.load_adapter("poet", lora.change(adapters))  # another under the name of one that left
        outputs = serving.generate(PROMPTS, ASKED, adapter="poet")
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert serving.misses == 0 and not compiled
    for i, output in enumerate(outputs):
        agree(output, expected["coder", i])


def test_adapters_share_no_prefix(llm, loras):
    serving = engine(llm, loras)
    prompt, statistics = list(range(5, 70)), serving.schedulers[0].statistics
    asked = dataclasses.replace(ASKED, max_new_tokens=2)
    first = serving.generate([prompt] * 3, asked, adapter=[None, "poet", "coder"])
    assert statistics.hit_tokens == 0
    again = serving.generate([prompt] * 3, asked, adapter=[None, "poet", "coder"])
    assert statistics.hit_tokens == 3 * 64
    assert [o.token_ids for o in first] == [o.token_ids for o in again]
    kept = len(serving.schedulers[0].prefix)
    serving.unload_adapter("poet")
    assert len(serving.schedulers[0].prefix) == kept - 4
    load = serving.schedulers[0].load()
    assert load.free_pages == load.total_pages


def test_who_waits_for_a_place_neither_blocks_nor_starves(llm, loras, expected):
    serving, ended = engine(llm, loras, adapters=1), []
    more = (serving.add(PROMPTS[0], ASKED, id=f"poet{i}", adapter="poet") for i in range(100))
    next(more), next(more)
    ended += serving.step()
    coder = serving.add(PROMPTS[0], ASKED, id="coder", adapter="coder")
    serving.add(PROMPTS[0], ASKED, id="plain")
    while not any(delta.id == coder and delta.finish_reason for delta in ended):
        next(more)  # a new one at each step: without a claim the place would never be free
        ended += serving.step()
    order = [delta.id for delta in ended if delta.finish_reason]
    assert order.index("plain") < order.index("coder"), "who needs no place passes by"
    assert {"poet0", "poet1"} == set(order[: order.index("coder")]) - {"plain"}
    outputs = {delta.id: delta.output for delta in ended}
    agree(outputs["coder"], expected["coder", 0])
    while not serving.idle:
        ended += serving.step()
    for delta in ended:
        if delta.finish_reason:
            agree(delta.output, expected[delta.id.rstrip("0123456789").replace("plain", "") or None, 0])


def test_a_claim_ends_with_who_made_it(llm, loras, expected):
    serving = engine(llm, loras, adapters=1)
    serving.add(PROMPTS[0], ASKED, adapter="poet")
    serving.step()
    serving.add(PROMPTS[0], ASKED, id="gone", adapter="coder")
    late = serving.add(PROMPTS[1], ASKED, adapter="poet")
    serving.step()
    assert serving.cancel("gone") and not serving.schedulers[0].running[1:]
    serving.step()
    assert len(serving.schedulers[0].running) == 2, "the place is open again"
    ended = {}
    while not serving.idle:
        ended |= {delta.id: delta.output for delta in serving.step()}
    agree(ended[late], expected["poet", 1])


def test_what_is_refused(llm, loras):
    lora, adapters, _ = loras["coder"]
    change = lora.change(adapters)
    serving = engine(llm, loras, ["coder"], adapter_rank=3, adapter_targets=("attn/",))
    with pytest.raises(ValueError, match="adapter 'codr' is not loaded; did you mean coder?"):
        serving.add([5], ASKED, adapter="codr")
    with pytest.raises(ValueError, match="'x' is not loaded"):
        serving.unload_adapter("x")
    with pytest.raises(ValueError, match="adapter has 1 entries for 2 prompts"):
        serving.generate([[5], [6]], ASKED, adapter=["coder"])
    with pytest.raises(ValueError, match="'coder' is loaded already"):
        serving.load_adapter("coder", change)
    poet, poems, _ = loras["poet"]
    with pytest.raises(ValueError, match="changes layers/mlp/down.*adapter_targets"):
        serving.load_adapter("poet", poet.change(poems))
    attention = {path: one for path, one in poet.change(poems).items() if "attn" in path}
    with pytest.raises(ValueError, match="has rank 8 at layers/attn/w.*adapter_rank=8"):
        serving.load_adapter("poet", attention)
    wide = {path: dataclasses.replace(one, a=one.a[..., :-1]) for path, one in change.items()}
    with pytest.raises(ValueError, match="another model"):
        serving.load_adapter("wide", wide)
    spoilt = {path: dataclasses.replace(one, scale=float("nan")) for path, one in change.items()}
    with pytest.raises(ValueError, match="not finite"):
        serving.load_adapter("spoilt", spoilt)
    with pytest.raises(ValueError, match="expected a LowRank"):
        serving.load_adapter("tree", adapters)
    with pytest.raises(ValueError, match="lora.whole has"):
        whole = LoraConfig(targets=("attn/wq$",), whole=("norm/scale",))
        LoraModel(MODEL, whole).change({})
    serving.add([5], ASKED, id="r", adapter="coder")
    with pytest.raises(ValueError, match=r"'coder' is used by requests \['r'\]"):
        serving.unload_adapter("coder")
    serving.cancel("r")
    serving.unload_adapter("coder")
    assert serving.runner.adapters.names == ()
    with pytest.raises(ValueError, match="set EngineConfig.adapters"):
        Engine(llm, EngineConfig(**(SIZES | {"adapters": 0}))).load_adapter("coder", change)
    with pytest.raises(
        ValueError, match="EngineConfig.adapter_targets='lm_head' matches none of layers"
    ):
        engine(llm, loras, [], adapter_targets=("lm_head",))
    with pytest.raises(ValueError, match="adapter_rank=0"):
        EngineConfig(adapter_rank=0)


@pytest.mark.parametrize("seed", range(20))
def test_places_in_random_traffic(seed):
    rng, now = random.Random(seed), [0.0]
    count, places = rng.randint(1, 3), Places(rng.randint(1, 3))
    sizes = {"max_rows": 3, "token_budget": 24, "page_size": 4, "max_length": 40}
    sizes |= {"pools": (PoolSpec(14),), "aging_s": rng.choice([1.0, float("inf")])}
    shards = [
        Scheduler(SchedulerConfig(**sizes), lambda: now[0], places.may_begin) for _ in range(count)
    ]
    open_plans, ended, most = [[] for _ in shards], {}, 0
    for number in range(150):
        now[0] += 0.1
        if number < 60:
            request = Request(
                str(number),
                tuple(range(1, rng.randint(2, 20))),
                rng.randint(1, 15),
                n=rng.choice([1, 1, 2]),
                priority=rng.randint(0, 2),
                adapter=rng.choice([None, "a", "b", "c", "d", "e"]),
            )
            ended[request.id] = None
            rng.choice(shards).add(request)
        if rng.random() < 0.1:
            rng.choice(shards).cancel(str(rng.randrange(60)))
        for _ in range(3):
            places.begin(x for shard in shards for x in shard.running)
            plans = [
                shard.plan() if len(o) < 2 else None for shard, o in zip(shards, open_plans, strict=True)
            ]
            names = {row.sequence.request.adapter for plan in plans if plan for row in plan.rows} - {
                None
            }
            assert len({places[name] for name in names}) == len(names), "one place for each that runs"
            most = max(most, len(names))
            for shard, waiting, plan in zip(shards, open_plans, plans, strict=True):
                waiting += [plan] if plan else []
                if waiting and (len(waiting) == 2 or rng.random() < 0.7 or not plan):
                    oldest = waiting.pop(0)
                    tokens = {i: [1] for i, row in enumerate(oldest.rows) if row.samples}
                    shard.commit(oldest, tokens, {i for i in tokens if rng.random() < 0.05})
    assert all(shard.idle for shard in shards), "nobody waits forever"
    assert most > 0


# Directories of PEFT.


def test_what_we_export_is_read_again(llm, loras, expected, tmp_path):
    for name in LORAS:
        lora, adapters, _ = loras[name]
        export_peft(tmp_path / name, lora, adapters)
    serving = engine(llm, loras, [])
    for name in LORAS:
        serving.load_adapter(name, tmp_path / name)
    serve(serving, expected)


PEFT = {
    "llama": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 2, r"layers\.2\.self_attn\.q_proj": 5},
            "alpha_pattern": {"down_proj": 12},
            "layers_to_transform": [0, 2],
        },
    ),
    "rslora, all weights": ("mistral window", {"target_modules": "all-linear", "use_rslora": True}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("kind", PEFT)
def test_what_peft_writes(tmp_path, kind):
    peft = pytest.importorskip("peft")
    family, settings = PEFT[kind]
    tiny.DECODERS[family].save(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | settings
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    model.save_pretrained(tmp_path / "adapter")
    with contextlib.redirect_stderr(io.StringIO()):  # the progress bar of saving
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
    model = describe(load_config(tmp_path / "base"))
    change = load_peft(tmp_path / "adapter", model)
    before, after = (
        flatten(load_hf(tmp_path / name, model, make_mesh("data:1"))) for name in ("base", "merged")
    )
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == set(change)
    for path, one in change.items():
        b = one.b.reshape(len(one.b), -1, one.b.shape[-1])
        want = before[path] + (b @ one.a).reshape(before[path].shape)
        np.testing.assert_allclose(after[path], want, atol=1e-6)  # sums in another order


def test_directories_that_cannot_be_served(llm, loras, tmp_path):
    lora, adapters, _ = loras["coder"]
    directory = export_peft(tmp_path / "adapter", lora, adapters)
    config = json.loads((directory / "adapter_config.json").read_text())
    settings = {
        "peft_type": "IA3",
        "bias": "all",
        "use_dora": True,
        "modules_to_save": ["lm_head"],
        "init_lora_weights": "pissa",
        "lora_alpha": "x",
    }
    serving = engine(llm, loras, [])
    for key, value in settings.items():
        (directory / "adapter_config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=f"adapter 'a': .*adapter_config.json: {key}="):
            serving.load_adapter("a", directory)
    (directory / "adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    with pytest.raises(ValueError, match="expected rank 4 as adapter_config.json says"):
        serving.load_adapter("a", directory)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    file = directory / "adapter_model.safetensors"
    kept = TensorFile(file)
    tensors = {name: np.array(kept.view(name)) for name in kept.names}
    first = next(iter(tensors))
    for old, new, message in (
        ("layers.0.", "layers.9.", "is no weight of a product in this model of 2 layers"),
        ("q_proj", "z_proj", "is no weight of a product"),
        ("lora_A.weight", "lora_embedding_A", "is no part of a low-rank change"),
    ):
        _write(file, {name.replace(old, new): x for name, x in tensors.items()})
        with pytest.raises(ValueError, match=message):
            load_peft(directory, MODEL)
    _write(file, {name: x for name, x in tensors.items() if name != first})
    with pytest.raises(ValueError, match="alone, expected A and B"):
        load_peft(directory, MODEL)
    _write(file, tensors | {first: tensors[first][:, :-1]})
    with pytest.raises(ValueError, match=r"expected \[rank, 128\] and \[128, rank\] for layers/attn/wq"):
        load_peft(directory, MODEL)
    file.rename(directory / "adapter_model.bin")
    with pytest.raises(ValueError, match="there is \\['adapter_model.bin'\\]; pickles"):
        serving.load_adapter("a", directory)
    with pytest.raises(ValueError, match="adapter_config.json is missing"):
        serving.load_adapter("a", tmp_path)


def _write(file, tensors):
    layout = {name: (x.dtype, x.shape) for name, x in tensors.items()}
    write_tensors(file, layout, tensors.__getitem__)


@pytest.mark.slow
def test_strict_numerics_whatever_place_and_company(llm, loras):
    asked = dataclasses.replace(ASKED, logprobs=2)
    keys = [(name, i) for name in NAMES for i in range(len(PROMPTS))]
    results = []
    for changes, order in [({}, keys), ({"adapters": 2, "max_rows": 2, "token_budget": 17}, keys[::-1])]:
        serving = engine(llm, loras, strict_numerics=True, **changes)
        outputs = serving.generate([PROMPTS[i] for _, i in order], asked, adapter=[n for n, _ in order])
        found = zip(order, outputs, strict=True)
        results.append({key: (o.token_ids, o.logprobs, o.top_logprobs) for key, o in found})
    assert results[0] == results[1]
