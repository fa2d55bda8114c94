"""LoRA: the formula on whole weights, what trains, and the adapters as the PEFT library reads them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from llm_jax.checkpoint.hf import load_config, load_hf
from llm_jax.checkpoint.peft import export_peft
from llm_jax.config import LoraConfig, OptimConfig
from llm_jax.models import describe
from llm_jax.models.lora import LoraModel
from llm_jax.ops.attention import FullContext
from llm_jax.sharding import make_mesh
from llm_jax.train.objectives import classification_logits, lm_loss
from llm_jax.train.optim import make_optimizer
from llm_jax.train.state import start_state
from llm_jax.train.step import make_train_step
from llm_jax.tree import flatten, unflatten
from tests import tiny

peft = pytest.importorskip("peft")
LORA = LoraConfig(rank=3, alpha=5.0, targets=("attn/w[qv]$", "mlp/down$"))
TOKENS = np.random.default_rng(0).integers(3, tiny.VOCAB, (4, 11)).astype(np.int32)
BATCH = {
    "tokens": TOKENS,
    "targets": np.concatenate([TOKENS[:, 1:], np.full((4, 1), -1, np.int32)], axis=1),
    "segment_ids": np.ones_like(TOKENS),
    "positions": np.tile(np.arange(11, dtype=np.int32), (4, 1)),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(directory, transformers model, ours, parameters on one device)."""
    directory = tmp_path_factory.mktemp("llama")
    theirs = tiny.DECODERS["llama"].save(directory)
    model = describe(load_config(directory))
    return directory, theirs, model, load_hf(directory, model, make_mesh("data:1"))


def drawn(lora, params, mesh="data:1", std=0.3):
    """Adapters with every array drawn, so that b is not zero."""
    adapters = flatten(lora.init(params, make_mesh(mesh), jax.random.key(0)))
    rng = np.random.default_rng(1)
    return unflatten(
        {
            path: jax.device_put(rng.normal(0, std, x.shape).astype(x.dtype), x.sharding)
            for path, x in adapters.items()
        }
    )


def logits(net):
    hidden, _ = net(BATCH["tokens"], BATCH["positions"], FullContext(jnp.asarray(BATCH["segment_ids"])))
    return net.unembed(hidden)


def test_it_starts_from_the_model_as_it_was(llama):
    _, _, model, params = llama
    lora = LoraModel(model, LORA)
    adapters = lora.init(params, make_mesh("data:1"), jax.random.key(0))
    adapted = jax.jit(lambda a, p: logits(lora.bind(a, p)))(adapters, params)
    plain = jax.jit(lambda p: logits(model.bind(p)))(params)
    np.testing.assert_array_equal(adapted, plain)
    flat = flatten(adapters)
    assert all((np.asarray(x) == 0).all() for path, x in flat.items() if path.endswith("/b"))
    a = np.asarray(flat["layers/mlp/down/a"])  # [L, R, F]: standard deviation 1 / sqrt(F)
    assert abs(a.std() * a.shape[-1] ** 0.5 - 1) < 0.15


def test_merged_adapted_and_the_formula_agree(llama):
    _, _, model, params = llama
    lora = LoraModel(model, LORA)
    adapters = drawn(lora, params)
    merged = lora.merge(adapters, params)
    flat, small, base = flatten(merged), flatten(adapters), flatten(params)
    for path, value in flat.items():
        if path not in lora.targets:
            np.testing.assert_array_equal(value, base[path])
            continue
        a, b, w = (
            np.asarray(x, np.float64) for x in (small[f"{path}/a"], small[f"{path}/b"], base[path])
        )
        for layer in range(len(w)):
            change = b[layer].reshape(-1, 3) @ a[layer].reshape(3, -1)
            want = w[layer] + 5.0 / 3.0 * change.reshape(w[layer].shape)
            np.testing.assert_allclose(value[layer], want, rtol=1e-5, atol=1e-6)
    adapted = jax.jit(lambda a, p: logits(lora.bind(a, p)))(adapters, params)
    plain = jax.jit(lambda p: logits(model.bind(p)))(merged)
    np.testing.assert_allclose(adapted, plain, rtol=2e-4, atol=2e-4)  # sums in another order


def test_only_adapters_train_and_sharded_equals_unsharded(llama):
    directory, _, model, _ = llama
    losses, adapters = {}, {}
    for name in ("data:1", "data:2,fsdp:2,tensor:2"):
        mesh = make_mesh(name)
        params = load_hf(directory, model, mesh)
        before = jax.tree.map(np.asarray, params)
        lora = LoraModel(model, LORA)
        optimizer = make_optimizer(OptimConfig(1e-2, "constant", warmup_fraction=0.0), lora, 8)
        state = start_state(lora.init(params, mesh, jax.random.key(0)), lora, optimizer, mesh)
        step = make_train_step(lora, lm_loss, optimizer, mesh)
        losses[name] = []
        for _ in range(8):
            state, metrics = step(state, BATCH, jax.random.key(0), params)
            losses[name].append(float(metrics["loss"]))
        adapters[name] = jax.tree.map(np.asarray, state.params)
        jax.tree.map(np.testing.assert_array_equal, params, before)
    first, second = losses.values()
    assert first[-1] < first[0] - 0.3
    np.testing.assert_allclose(first, second, rtol=1e-4)
    moved = flatten(adapters["data:1"])
    assert all(np.abs(x).max() > 1e-3 for path, x in moved.items() if path.endswith("/b"))
    b = flatten(state.params)["layers/attn/wq/b"]
    assert b.addressable_shards[0].data.size < b.size, "b is split as its weight's output axes are"


def test_peft_reads_the_adapters(llama, tmp_path):
    directory, theirs, model, params = llama
    lora = LoraModel(model, LORA)
    adapters = drawn(lora, params)
    export_peft(tmp_path / "adapter", lora, adapters, base=str(directory))
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        want = adapted(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
        plain = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    got = jax.jit(lambda a, p: logits(lora.bind(a, p)))(adapters, params)
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, atol=2e-5 * scale)
    assert np.abs(want - plain).max() > 0.1 * scale


def test_peft_reads_a_head_that_was_trained_whole(tmp_path):
    tiny.CLASSIFIERS["bert classifier"].save(tmp_path / "base")
    model = describe(load_config(tmp_path / "base"))
    params = load_hf(tmp_path / "base", model, make_mesh("data:1"))
    lora = LoraModel(
        model, LoraConfig(rank=2, alpha=2.0, targets=("attn/w[qv]$",), whole=("^classifier/",))
    )
    adapters = drawn(lora, params)
    export_peft(tmp_path / "adapter", lora, adapters)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        want = adapted(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    batch = {name: jnp.asarray(value) for name, value in BATCH.items()}
    got = jax.jit(lambda a, p: classification_logits(lora.bind(a, p), batch, None))(adapters, params)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_fused_weights_have_no_peft_form(tmp_path):
    tiny.DECODERS["gpt2"].save(tmp_path / "base")
    model = describe(load_config(tmp_path / "base"))
    params = load_hf(tmp_path / "base", model, make_mesh("data:1"))
    lora = LoraModel(model, LoraConfig(targets=("attn/wq$",)))
    with pytest.raises(ValueError, match="layers/attn/wq.*c_attn"):
        export_peft(tmp_path / "adapter", lora, drawn(lora, params))
    assert not (tmp_path / "adapter").exists()
    lora = LoraModel(model, LoraConfig(rank=2, targets=("attn/wo$",)))
    export_peft(tmp_path / "adapter", lora, drawn(lora, params))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"]
    with pytest.raises(ValueError, match="not empty"):
        export_peft(tmp_path / "adapter", lora, drawn(lora, params))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("attn/wz",)}, "lora.targets='attn/wz' matches none of .*layers/attn/wq"),
        ({"targets": ("norm/scale",)}, "matches none"),
        ({"whole": ("attn/wq$",)}, "both name"),
    ],
)
def test_patterns_that_cannot_work_are_refused(llama, settings, message):
    with pytest.raises(ValueError, match=message):
        LoraModel(llama[2], LoraConfig(**settings))
