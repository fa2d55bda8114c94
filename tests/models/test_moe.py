"""Models with experts beside transformers: choices, training, generation and meshes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llm_jax.cache import init_cache
from llm_jax.checkpoint.hf import load_config, load_hf
from llm_jax.config import EngineConfig, LoraConfig, OptimConfig
from llm_jax.engine.engine import Engine
from llm_jax.infer.llm import LLM
from llm_jax.infer.steps import make_forward
from llm_jax.infer.taps import run_with_taps
from llm_jax.models import describe, init_params, moe
from llm_jax.models.adapter_bank import AdapterBank
from llm_jax.models.cost import forward_flops
from llm_jax.models.lora import LoraModel
from llm_jax.ops.attention import FullContext
from llm_jax.ops.sampling import SamplingParams
from llm_jax.ops.taps import Patch, Taps
from llm_jax.sharding import batch_sharding, make_mesh
from llm_jax.train.distill import StudentAndTeacher, distillation_loss
from llm_jax.train.objectives import lm_loss
from llm_jax.train.optim import make_optimizer
from llm_jax.train.state import init_state
from llm_jax.train.step import make_eval_step, make_train_step
from llm_jax.tree import OfLayer
from tests import tiny

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
MESHES = ["expert:8", "data:2,expert:4", "expert:2,tensor:4", "fsdp:2,expert:4"]
GREEDY = SamplingParams(max_new_tokens=9, temperature=0, ignore_eos=True, logprobs=0)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, tiny.VOCAB, n).tolist() for n in (17, 3, 9, 5, 11)]
SIZES = {"max_rows": 2, "token_budget": 16, "max_length": 32, "page_size": 8, "compile_ahead": False}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """f(name, mesh) -> (transformers' model, our model, parameters on the mesh)."""

    @functools.cache
    def saved(name):
        directory = tmp_path_factory.mktemp("moe")
        return directory, tiny.DECODERS[name].save(directory)

    def get(name, mesh=""):
        directory, theirs = saved(name)
        model = describe(load_config(directory))
        return theirs, model, load_hf(directory, model, make_mesh(mesh))

    return get


def batch(rows=8, length=12):
    """Rows of unequal length, with the ends of texts as padding."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, tiny.VOCAB, (rows, length)).astype(np.int32)
    real = np.arange(length) < length - np.arange(rows)[:, None] % 5
    targets = np.where(real & np.roll(real, -1, 1), np.roll(tokens, -1, 1), -1)
    targets[:, -1] = -1
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return {
        "tokens": np.where(real, tokens, 0),
        "targets": targets.astype(np.int32),
        "segment_ids": real.astype(np.int32),
        "positions": positions,
    }


@pytest.mark.parametrize("name", ["mixtral", slow("qwen3_moe")])
def test_choices_of_experts_are_those_of_transformers(loaded, name):
    theirs, model, params = loaded(name)
    tokens = batch(2)["tokens"]
    with torch.no_grad():
        out = theirs(torch.tensor(tokens.astype(np.int64)), output_router_logits=True)
    _, found = run_with_taps(model, params, tokens, Taps(("router", "mlp_out")))
    wanted = np.stack([x.numpy() for x in out.router_logits]).reshape(found["router"].shape)
    np.testing.assert_allclose(found["router"], wanted, atol=2e-5)


def test_a_patch_chooses_the_experts(loaded):
    """Logits of one expert alone: what comes out of the layer is that expert's, with weight 1."""
    _, model, params = loaded("mixtral")
    tokens, wanted = batch(1)["tokens"], 5
    value = np.where(np.arange(8) == wanted, 100.0, 0.0)
    taps = Taps(("router", "mlp_out", "attn_out", "embed"), (0,), (Patch("router", value, 0),))
    _, found = run_with_taps(model, params, tokens, taps)
    np.testing.assert_array_equal(found["router"][0, 0], np.tile(value, (tokens.shape[1], 1)))
    layer = jax.tree.map(lambda x: np.asarray(x[0], np.float64), params["layers"])
    x = found["embed"][0] + found["attn_out"][0, 0]
    x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * layer["mlp_norm"]["scale"]
    gate, up, down = (layer["moe"][name][wanted] for name in ("gate", "up", "down"))
    g = x @ gate.T
    expected = (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T
    np.testing.assert_allclose(found["mlp_out"][0, 0], expected, atol=2e-5)


# --- Training ------------------------------------------------------------------------------------


def loss_and_gradients(model, mesh, params, rows, coefficient=0.0, **settings):
    config = dataclasses.replace(model.config, router_aux_loss=coefficient, **settings)
    model = describe(config)

    def loss(params):
        total, count, metrics = lm_loss(model.bind(params), rows, jax.random.key(0))
        return total / count, metrics["router_balance"]

    with jax.set_mesh(mesh):
        (value, (balance, count)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return float(value), float(balance / count), grads


@pytest.mark.parametrize("name", ["mixtral", slow("qwen3_moe")])
def test_loss_and_gradients_are_those_of_transformers(loaded, name):
    """With the load-balancing loss, of the real tokens alone."""
    theirs, model, params = loaded(name)
    rows, coefficient = batch(), 0.3
    ours, balance, grads = loss_and_gradients(model, make_mesh(""), params, rows, coefficient)
    mask = torch.tensor(rows["segment_ids"])
    ids = torch.tensor(rows["tokens"].astype(np.int64))
    out = theirs(ids, attention_mask=mask, output_router_logits=True)
    targets = torch.tensor(rows["targets"].astype(np.int64))
    text = torch.nn.functional.cross_entropy(
        out.logits.flatten(0, 1), targets.flatten(), ignore_index=-1
    )
    wanted = text + coefficient * out.aux_loss
    np.testing.assert_allclose([ours, balance], [wanted.item(), out.aux_loss.item()], rtol=2e-6)
    theirs.zero_grad()
    wanted.backward()
    block, held = theirs.model.layers[1].mlp, grads["layers"]["moe"]
    gate, up = np.split(block.experts.gate_up_proj.grad.numpy(), 2, axis=1)
    pairs = {"gate": gate, "up": up, "down": block.experts.down_proj.grad.numpy()}
    pairs["router"] = block.gate.weight.grad.numpy()
    for part, expected in pairs.items():
        tolerance = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(held[part][1], expected, rtol=0, atol=tolerance, err_msg=part)


def test_an_evaluation_has_no_balance_in_its_loss(loaded):
    _, model, params = loaded("mixtral")
    rows = batch()
    model = describe(dataclasses.replace(model.config, router_aux_loss=1.0))
    sums = make_eval_step(model, lm_loss, make_mesh(""))(params, rows)
    plain = loss_and_gradients(model, make_mesh(""), params, rows)[:2]
    values = [float(a / b) for a, b in (sums["loss"], sums["router_balance"])]
    np.testing.assert_allclose(values, plain, rtol=1e-6)


@pytest.mark.slow
def test_distillation_balances_the_student(loaded):
    _, model, params = loaded("mixtral")
    rows = batch()

    @functools.partial(jax.jit, static_argnums=0)
    def loss(coefficient, params):
        student = describe(dataclasses.replace(model.config, router_aux_loss=coefficient))
        nets = StudentAndTeacher(student.bind(params), model.bind(params))
        how = {"temperature": 2.0, "weight": 0.5, "hidden_weight": 0.0}
        total, count, metrics = distillation_loss(nets, rows, jax.random.key(0), **how)
        return total / count, metrics["router_balance"][0] / count

    (plain, _), (balanced, balance) = loss(0.0, params), loss(0.3, params)
    np.testing.assert_allclose(balanced - plain, 0.3 * balance, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "dots_no_batch", "full"])
def test_rematerialization_changes_nothing(loaded, remat):
    _, model, params = loaded("mixtral")
    plain = loss_and_gradients(model, make_mesh(""), params, batch(), 0.1)
    again = loss_and_gradients(model, make_mesh(""), params, batch(), 0.1, remat=remat)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("mesh", [MESHES[2], *map(slow, [MESHES[0], MESHES[1], MESHES[3]])])
def test_any_mesh_trains_alike(loaded, mesh):
    _, model, params = loaded("mixtral")
    plain = loss_and_gradients(model, make_mesh(""), params, batch(), 0.1)
    _, _, split = loaded("mixtral", mesh)
    ours = loss_and_gradients(model, make_mesh(mesh), split, batch(), 0.1)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    "optimizer, mesh", [("adamw", "expert:2"), slow("muon", ""), slow("adafactor", "")]
)
def test_a_tiny_model_learns(loaded, optimizer, mesh):
    _, model, _ = loaded("mixtral")
    mesh, rows = make_mesh(mesh), batch()
    model = describe(dataclasses.replace(model.config, num_layers=1, router_aux_loss=0.01))
    rate = {"adamw": 1e-2, "muon": 1e-2, "adafactor": 3e-2}[optimizer]
    rule = make_optimizer(OptimConfig(rate, "constant", optimizer=optimizer), model, 30)
    step = make_train_step(model, lm_loss, rule, mesh, accumulate=1 if mesh.size > 1 else 2)
    state, history = init_state(model, rule, mesh, jax.random.key(0)), []
    for _ in range(30):
        state, metrics = step(state, rows, jax.random.key(1))
        history.append({name: float(value) for name, value in metrics.items()})
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert 2.0 <= history[-1]["router_balance"] + 1e-6 < 4.0, "2 is that of equal use"


# --- Generation ----------------------------------------------------------------------------------


def texts(llm):
    return [(out.token_ids, out.logprobs) for out in llm.generate(PROMPTS, GREEDY)]


def same(ours, theirs):
    for (tokens, scores), (wanted, expected) in zip(ours, theirs, strict=True):
        assert tokens == wanted
        np.testing.assert_allclose(scores, expected, atol=3e-5)


def llm_of(loaded, name, mesh=""):
    _, model, params = loaded(name, mesh)
    return LLM.from_params(model, params, None, mesh=make_mesh(mesh))


def test_layers_apart_and_scanned_with_their_matrices_read_in_place(loaded, monkeypatch):
    _, model, params = loaded("qwen3_moe")
    apart = texts(llm_of(loaded, "qwen3_moe"))
    calls, hold = [], moe.hold_matrices

    def noted(*given):
        layers = hold(*given)
        calls.append({name for name, x in layers["moe"].items() if isinstance(x, OfLayer)})
        return layers

    monkeypatch.setattr("llm_jax.models.transformer.hold_matrices", noted)
    scanned = LLM.from_params(model, params, None, mesh=make_mesh(""))
    scanned.params = params
    same(texts(scanned), apart)
    assert calls and all(names == {"gate", "up", "down"} for names in calls)


@pytest.mark.parametrize(
    "mesh", [MESHES[2], *map(slow, [MESHES[0], MESHES[1], MESHES[3], "data:2,expert:3"])]
)
def test_any_mesh_generates_the_same(loaded, mesh):
    """8 experts do not divide by 3: each device then has all of them."""
    same(texts(llm_of(loaded, "mixtral window", mesh)), texts(llm_of(loaded, "mixtral window")))


@pytest.mark.parametrize("mesh", ["expert:2,tensor:2", *map(slow, ["", "expert:8", "fsdp:2,expert:4"])])
def test_an_engine_generates_the_same(loaded, mesh):
    llm = llm_of(loaded, "mixtral window", mesh)
    outs = Engine(llm, EngineConfig(**SIZES)).generate(PROMPTS, GREEDY)
    same([(out.token_ids, out.logprobs) for out in outs], texts(llm_of(loaded, "mixtral window")))


@pytest.mark.slow
def test_strict_numerics(loaded):
    llm = llm_of(loaded, "mixtral window")
    engine = Engine(llm, EngineConfig(**SIZES, strict_numerics=True))
    together = engine.generate(PROMPTS, GREEDY)
    alone = [engine.generate([prompt], GREEDY)[0] for prompt in PROMPTS]
    assert [(a.token_ids, a.logprobs) for a in together] == [(a.token_ids, a.logprobs) for a in alone]


def collectives(text):
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return sorted(re.findall(rf" ({kinds})(?:-start)?\(", text))


@pytest.mark.parametrize(
    "mesh, wanted",
    [
        # The tokens and their routes to where the experts are, and the sums back.
        ("expert:8", ["all-gather"] * 2 + ["reduce-scatter"]),
        # Attention's sum over heads; the experts' over their widths; the lookup of 97 words is whole.
        ("expert:2,tensor:2", ["all-gather"] * 2 + ["all-reduce"] * 2 + ["reduce-scatter"]),
    ],
)
def test_collectives_of_a_layer(loaded, mesh, wanted):
    """In a decode step; nothing but the scanned body, which is there once, communicates."""
    _, model, params = loaded("mixtral", mesh)
    mesh = make_mesh(mesh)
    with jax.set_mesh(mesh):
        cache = init_cache(model.config, 8, 32, mesh)
        shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)  # noqa: E731
        tokens = jax.ShapeDtypeStruct((8,), jnp.int32, sharding=batch_sharding(mesh, (8,)))
        lowered = make_forward(model).lower(*jax.tree.map(shape, (params, cache)), tokens)
    assert collectives(lowered.compile().as_text()) == wanted


# --- What else there is to a model ---------------------------------------------------------------


def test_flops_count_the_experts_that_a_token_has(loaded):
    model = describe(dataclasses.replace(loaded("mixtral")[1].config, num_experts=4))
    one = describe(dataclasses.replace(model.config, num_experts=1, experts_per_token=1))
    three = describe(dataclasses.replace(model.config, experts_per_token=3))
    cfg = model.config
    expert = 2 * cfg.num_layers * 3 * cfg.mlp_dim * cfg.embed_dim
    router = 2 * cfg.num_layers * cfg.embed_dim
    flops = [forward_flops(m, 1, 16) for m in (one, model, three)]
    assert flops[1] - flops[0] == expert + 3 * router and flops[2] - flops[1] == expert


def test_an_expert_lies_on_one_device(loaded):
    _, _, params = loaded("mixtral", "expert:4,tensor:2")
    for name, (rows, columns) in {"gate": (38, 48), "up": (38, 48), "down": (48, 38)}.items():
        for shard in params["layers"]["moe"][name].addressable_shards:
            assert shard.data.shape == (3, 2, rows, columns)
    assert params["layers"]["moe"]["router"].addressable_shards[0].data.shape == (3, 8, 48)


def test_adapters_leave_experts_alone(loaded):
    model = loaded("mixtral")[1]
    assert not [t for t in AdapterBank(model, 1, 2, make_mesh("")).targets if "moe" in t]
    assert LoraModel(model, LoraConfig(2, targets=("attn/",))).targets
    with pytest.raises(ValueError, match=r"lora.targets=.*layers/moe/router.*has no adapters"):
        LoraModel(model, LoraConfig(2, targets=("attn/", "moe/")))


def test_random_experts_have_unit_outputs(loaded):
    """Matrices are drawn by their own fan-in, not that of all experts together."""
    model = loaded("mixtral")[1]
    params = init_params(model, make_mesh(""), jax.random.key(0))
    for name, inner in {"gate": 48, "up": 48, "down": 76, "router": 48}.items():
        np.testing.assert_allclose(np.std(params["layers"]["moe"][name]), inner**-0.5, rtol=0.05)


def test_padding_may_choose_anything(loaded):
    """What stands in padding changes nothing that is real."""
    _, model, params = loaded("mixtral")
    rows = batch(2)

    @jax.jit
    def hidden(tokens):
        return model.bind(params)(tokens, rows["positions"], FullContext(rows["segment_ids"]))[0]

    real = rows["segment_ids"] > 0
    other = np.where(real, rows["tokens"], 7)
    np.testing.assert_allclose(
        np.asarray(hidden(rows["tokens"]))[real], np.asarray(hidden(other))[real], atol=1e-5
    )
