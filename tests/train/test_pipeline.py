"""Layers in stages train as layers on one device do, and each stage holds its own layers alone."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import LLM
from llm_jax.cache import abstract_cache
from llm_jax.checkpoint import store
from llm_jax.config import LoraConfig, ModelConfig, OptimConfig
from llm_jax.infer.steps import make_prefill
from llm_jax.models import describe, init_params
from llm_jax.models.families import to_hf
from llm_jax.models.lora import LoraModel
from llm_jax.ops.attention import FullContext
from llm_jax.sharding import make_mesh
from llm_jax.train.objectives import lm_loss
from llm_jax.train.optim import make_optimizer
from llm_jax.train.state import abstract_state, init_state, start_state
from llm_jax.train.step import make_eval_step, make_train_step
from llm_jax.tree import flatten

CONFIG = ModelConfig(
    "llama",
    vocab_size=40,
    num_layers=4,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=24,
    max_positions=16,
    param_dtype="float32",
)
MODELS = {
    "llama": CONFIG,
    "gemma2": dataclasses.replace(  # what differs between layers does so within a stage and between two
        CONFIG, windows=(3, 0, 0, 5), attn_softcap=5.0, norm_position="sandwich", tie_embeddings=True
    ),
    "gemma3": dataclasses.replace(CONFIG, windows=(3, 3, 3, 0), local_rope_theta=100.0, qk_norm=True),
    "gpt2": dataclasses.replace(
        CONFIG, positions="learned", norm="layer", gated_mlp=False, qkv_bias=True, num_kv_heads=4
    ),
    "mixtral": dataclasses.replace(CONFIG, num_experts=4, experts_per_token=2, router_aux_loss=0.1),
}
STEPS = 8
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def batch(step=0, rows=8, length=16):
    """Rows of two documents and some padding, of which half the tokens can be known from the others."""
    rng = np.random.default_rng(step)
    columns = np.tile(np.arange(length), (rows, 1))
    first, end = columns < 6, rng.integers(length - 4, length + 1, (rows, 1))
    segments = np.where(first, 1, np.where(columns < end, 2, 0))
    tokens = (rng.integers(0, 40, (rows, 1)) + 3 * columns) % 40
    targets = np.where(np.roll(segments, -1, axis=1) == segments, np.roll(tokens, -1, axis=1), -1)
    targets[segments == 0] = -1
    targets[:, -1] = -1
    values = (tokens, targets, segments, np.where(first, columns, columns - 6))
    names = ("tokens", "targets", "segment_ids", "positions")
    return {name: x.astype(np.int32) for name, x in zip(names, values, strict=True)}


@functools.cache
def train(mesh="", name="llama", accumulate=1, **changes):
    """(losses of the steps, last state, compiled step) of a model on a mesh."""
    model, mesh = describe(dataclasses.replace(MODELS[name], **changes)), make_mesh(mesh)
    rule = make_optimizer(OptimConfig(1e-2, weight_decay=0.1, ema_decay=0.9), model, 50)
    step = make_train_step(model, lm_loss, rule, mesh, accumulate=accumulate)
    state = init_state(model, rule, mesh, jax.random.key(0))
    losses = []
    for number in range(STEPS):
        state, metrics = step(state, batch(number), jax.random.key(1))
        losses.append(float(metrics["loss"]))
    return losses, state, step


@pytest.mark.parametrize(
    ("mesh", "name", "options"),
    [
        ("stage:2,data:2,tensor:2", "llama", {}),
        slow("stage:4,fsdp:2", "llama", {}),
        slow("stage:2,context:2,fsdp:2", "llama", {}),
        slow("stage:2,fsdp:2", "llama", {"microbatches": 4}),
        slow("stage:2,fsdp:2", "llama", {"accumulate": 2}),
        slow("stage:2,fsdp:2", "llama", {"remat": "dots"}),
        slow("stage:2,fsdp:2", "llama", {"remat": "full", "microbatches": 4}),
        slow("stage:2,tensor:2", "gemma2", {}),
        slow("stage:2,context:2,fsdp:2", "gemma2", {"remat": "full"}),
        slow("stage:4", "gemma3", {}),
        slow("stage:4,tensor:2", "gpt2", {}),
        slow("stage:2,expert:2,tensor:2", "mixtral", {}),
    ],
)
def test_losses_are_those_of_one_device(mesh, name, options):
    losses, expected = train(mesh, name, **options)[0], train("", name)[0]
    assert expected[-1] < expected[0] - 0.1
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_no_device_holds_the_layers_of_another_stage():
    state = train("stage:2,data:2,tensor:2")[1]
    (adam,) = (s for s in state.opt_state if hasattr(s, "mu"))
    for tree in (state.params, adam.mu, adam.nu, state.best_params):
        for path, x in flatten(tree["layers"]).items():
            for shard in x.addressable_shards:
                stage = shard.device.id // 4
                assert shard.index[0] == slice(2 * stage, 2 * stage + 2), path


KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def collectives(text):
    """{(kind, sizes)} of all results of collectives in a compiled program."""
    found = re.findall(rf"= (.*) ({KINDS})(?:-start)?\(", text)
    shapes = lambda results: re.findall(r"\[([\d,]*)\]", results)  # noqa: E731
    sizes = lambda shape: tuple(map(int, filter(None, shape.split(","))))  # noqa: E731
    return {(kind, sizes(shape)) for results, kind in found for shape in shapes(results)}


def test_only_activations_and_what_all_stages_share_travel():
    model, mesh = describe(dataclasses.replace(CONFIG, remat="full")), make_mesh("stage:4,data:2")
    rule = make_optimizer(OptimConfig(1e-2), model, 50)
    step = make_train_step(model, lm_loss, rule, mesh)
    lowered = step.lower(abstract_state(model, rule, mesh), batch(length=12), jax.random.key(1))
    found = collectives(lowered.compile().as_text())
    # Rows x 12 tokens x 16 numbers: a data shard has four of the eight rows, a microbatch one of them.
    assert ("collective-permute", (1, 12, 16)) in found and ("all-gather", (4, 12, 16)) in found
    assert not any(shape == (8, 12, 16) for _, shape in found)
    layers = {x.shape[1:] for x in jax.tree.leaves(model.shapes["layers"]) if x.ndim > 2}
    shared = {model.shapes["embed"]["tokens"].shape, model.shapes["lm_head"]["weight"].shape}
    for kind, shape in found:  # gradients of layers are summed over data
        of_layers = any(shape[-len(weight) :] == weight for weight in layers)
        assert kind == "all-reduce" or not of_layers, (kind, shape)
    assert any(kind == "all-reduce" and shape in shared for kind, shape in found)


def test_every_microbatch_draws_its_own_dropout():
    model, mesh = describe(dataclasses.replace(CONFIG, dropout=0.5)), make_mesh("stage:2")
    tokens = jnp.ones((8, 4), jnp.int32)  # all rows are alike

    @jax.jit
    def hidden(params, key):
        context = FullContext(tokens, key)
        # Without the embedding's dropout, which is drawn for the whole batch.
        net = model.bind(params)
        return net._through_layers(jnp.ones((8, 4, 16), jnp.float32), tokens, context)[0]

    with jax.set_mesh(mesh):
        params = init_params(model, mesh, jax.random.key(0))
        first, again, other = (hidden(params, jax.random.key(seed)) for seed in (1, 1, 2))
    rows = {row.tobytes() for row in np.asarray(first)}
    assert len(rows) == 8
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.slow
def test_adapters_beside_frozen_weights_train_alike():
    model = describe(CONFIG)
    lora = LoraModel(model, LoraConfig(rank=2, alpha=4.0, targets=("attn/w[qv]$", "mlp/down$")))
    found = []
    for mesh in map(make_mesh, ("", "stage:2,fsdp:2")):
        params = init_params(model, mesh, jax.random.key(0))
        rule = make_optimizer(OptimConfig(1e-2), lora, 50)
        step = make_train_step(lora, lm_loss, rule, mesh)
        state = start_state(lora.init(params, mesh, jax.random.key(1)), lora, rule, mesh)
        for number in range(4):
            state, metrics = step(state, batch(number), jax.random.key(2), params)
        found.append(float(metrics["loss"]))
        assert len(state.params["layers"]["mlp"]["down"]["a"].addressable_shards[0].data) == 4 // max(
            1, mesh.shape["stage"]
        )
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_an_encoder_is_the_same_in_stages():
    config = dataclasses.replace(
        MODELS["gpt2"],
        num_layers=2,
        causal=False,
        head="masked_lm",
        norm_position="post",
        embed_norm=True,
    )
    model, found = describe(config), []
    for mesh in map(make_mesh, ("", "stage:2")):
        params = init_params(model, mesh, jax.random.key(0))
        step = make_eval_step(model, lm_loss, mesh)
        found.append(float(step(params, batch())["loss"][0]))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.slow
def test_a_checkpoint_of_stages_is_restored_without(tmp_path):
    state = train("stage:4,fsdp:2")[1]
    items = lambda state: {"params": state.params, "train": {"opt_state": state.opt_state}}  # noqa: E731
    rules = {"keep": 1, "keep_best": 0, "best_metric": "eval/loss", "keep_every": 0}
    with store.open_checkpoints(tmp_path / "run", **rules) as checkpoints:
        checkpoints.save(STEPS, items(state), {})
    model, mesh = describe(CONFIG), make_mesh("data:8")
    rule = make_optimizer(OptimConfig(1e-2, weight_decay=0.1, ema_decay=0.9), model, 50)
    restored = store.restore(tmp_path / "run", items(abstract_state(model, rule, mesh)), STEPS)
    jax.tree.map(np.testing.assert_array_equal, restored, items(state))
    assert all(x.sharding.mesh.shape["data"] == 8 for x in jax.tree.leaves(restored["params"]))


@pytest.mark.parametrize(
    ("mesh", "changes", "rows", "message"),
    [
        ("stage:3", {}, 9, r"num_layers=4: expected a multiple of the stages of --mesh, stage:3"),
        ("stage:2", {"microbatches": 3}, 6, r"microbatches=3: expected a multiple .* stage:2, or 0"),
        (
            "stage:2",
            {"microbatches": 8},
            4,
            r"of 4 rows: expected a multiple of 8, .* change batch_size",
        ),
        ("stage:2,data:2", {"microbatches": 4}, 12, r"of 12 rows: expected a multiple of 8, "),
    ],
)
def test_what_cannot_be_cut_is_refused(mesh, changes, rows, message):
    model, mesh = describe(dataclasses.replace(CONFIG, **changes)), make_mesh(mesh)
    rule = make_optimizer(OptimConfig(1e-2), model, 50)
    with pytest.raises(ValueError, match=message):
        step = make_train_step(model, lm_loss, rule, mesh)
        step.lower(abstract_state(model, rule, mesh), batch(rows=rows), jax.random.key(1))


def test_a_negative_number_of_microbatches_is_refused():
    with pytest.raises(ValueError, match="microbatches"):
        dataclasses.replace(CONFIG, microbatches=-1)


def test_a_model_for_stages_is_exported_as_any():
    assert to_hf(dataclasses.replace(CONFIG, microbatches=4)) == to_hf(CONFIG)


def test_a_cache_in_stages_is_refused():
    model, mesh = describe(CONFIG), make_mesh("stage:2")
    cache = abstract_cache(model.config, 4, 16, mesh)
    tokens, lengths = np.ones((4, 8), np.int32), np.full(4, 8, np.int32)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="not for .*; take fsdp or tensor in"):
        make_prefill(model).lower(model.shapes, cache, tokens, lengths)


def test_generation_is_refused():
    with pytest.raises(ValueError, match="--mesh has stage=2: .* take tensor or fsdp"):
        LLM(mesh="stage:2")
    with pytest.raises(ValueError, match="--mesh has stage=2: .* take tensor or fsdp"):
        LLM.from_params(describe(CONFIG), {}, None, mesh="stage:2")
