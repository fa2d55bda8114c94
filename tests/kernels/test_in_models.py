"""Models by way of kernels: the TPU kernels in interpret mode on pretended devices, beside XLA's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.cache import init_cache
from llm_jax.config import ModelConfig
from llm_jax.infer.steps import make_prefill
from llm_jax.kernels.flash_attention.api import flash_attention
from llm_jax.models import describe, init_params
from llm_jax.models.key_heads import repeat_key_heads
from llm_jax.ops import attention
from llm_jax.ops.attention import AttentionOptions, FullContext
from llm_jax.sharding import make_mesh

pytestmark = pytest.mark.lenient  # jax's simulator promotes
CONFIG = ModelConfig(
    "llama", 256, 2, 64, num_heads=8, num_kv_heads=2, head_dim=16, mlp_dim=96, max_positions=256
)


@pytest.fixture
def on_tpu(monkeypatch):
    """f(): from here on attention is as on a TPU; the number of calls of the kernel is in its list."""
    calls = []

    def interpreted(*args, **options):
        calls.append(args[0].shape)
        return flash_attention(*args, interpret=True, **options)

    def switch():
        choose = functools.partial(attention.choose, kind="TPU v5e")
        monkeypatch.setattr(attention, "choose", choose)
        monkeypatch.setattr(attention, "flash_attention", interpreted)
        return calls

    return switch


@pytest.mark.parametrize("mesh", ["", "data:2,tensor:4", "data:4,tensor:2"])
def test_attention_within_a_batch_and_its_gradient(on_tpu, mesh):
    rng = np.random.default_rng(0)
    shapes = ((4, 160, 8, 16), (4, 160, 2, 16), (4, 160, 2, 16))
    q, k, v = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)
    segments = np.sort(rng.integers(0, 3, (4, 160)), axis=1).astype(np.int32)
    starts = np.array([[np.flatnonzero(row == s)[0] for s in row] for row in segments])
    positions = jnp.asarray(np.arange(160) - starts, jnp.int32)
    weights = jnp.asarray(rng.standard_normal(q.shape), jnp.float32)

    def results():
        def loss(q, k, v):
            context = FullContext(jnp.asarray(segments))
            options = AttentionOptions(causal=True, scale=0.25)
            out, _ = context.attend(0, q, k, v, positions=positions, window=0, options=options)
            return jnp.sum(out * weights), out

        with jax.set_mesh(make_mesh(mesh)):
            step = jax.jit(lambda *x: jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*x))
            return step(q, k, v)

    wanted = results()
    calls = on_tpu()
    got = results()
    rows, heads = {"": (4, 8), "data:2,tensor:4": (2, 2), "data:4,tensor:2": (1, 4)}[mesh]
    assert calls == [(rows, 160, heads, 16)], "each device has its own rows and heads"
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1.0, float(jnp.abs(theirs).max())))


@pytest.mark.parametrize("mesh", ["", pytest.param("data:2,tensor:4", marks=pytest.mark.slow)])
def test_windows_that_differ_between_scanned_layers(on_tpu, mesh):
    mesh, model = make_mesh(mesh), describe(dataclasses.replace(CONFIG, windows=(48, 0)))
    params = init_params(model, mesh, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 160)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(160)[None], tokens.shape)

    def results():
        def loss(params):
            hidden, _ = model.bind(params)(tokens, positions, FullContext(jnp.ones_like(tokens)))
            return jnp.mean(hidden[..., :7] ** 3)

        with jax.set_mesh(mesh):
            return jax.jit(jax.value_and_grad(loss))(params)

    wanted = results()
    calls = on_tpu()
    got = results()
    assert len(calls) == 2, "one kernel for each window"
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1e-2, float(jnp.abs(theirs).max())))


@pytest.mark.parametrize("mesh", ["", "data:2,tensor:4"])
def test_prompts(on_tpu, mesh):
    mesh = make_mesh(mesh)
    model = describe(CONFIG)
    params = repeat_key_heads(init_params(model, mesh, jax.random.key(0)), model, mesh)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 192)), jnp.int32)
    lengths = jnp.asarray([192, 130, 1, 77], jnp.int32)

    def results():
        with jax.set_mesh(mesh):
            return make_prefill(model)(params, init_cache(model.config, 4, 256, mesh), tokens, lengths)

    logits, cache = results()
    calls = on_tpu()
    make_prefill.cache_clear()
    got_logits, got_cache = results()
    make_prefill.cache_clear()
    assert calls, "the kernel was not called"
    np.testing.assert_allclose(got_logits, logits, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(got_cache), jax.tree.leaves(cache), strict=True):
        for row, length in enumerate(np.asarray(lengths)):  # what padding stored is nobody's
            if ours.ndim == 5:
                np.testing.assert_allclose(
                    ours[:, row, :, :length], theirs[:, row, :, :length], atol=1e-5
                )


def test_the_choice_of_an_implementation(monkeypatch):
    q, k = (jax.ShapeDtypeStruct((1, 256, n, 64), jnp.bfloat16) for n in (4, 2))
    short = jax.ShapeDtypeStruct((1, 40, 4, 64), jnp.bfloat16)

    def form(q, implementation):
        options = attention.AttentionOptions(True, 1.0, implementation=implementation)
        return attention.attention_form(q, k, options, training=True)

    assert form(q, "auto") == "xla", "no kernel on this machine"
    with pytest.raises(ValueError, match="attention='pallas': there is no kernel for cpu"):
        form(q, "pallas")
    monkeypatch.setattr(attention, "choose", functools.partial(attention.choose, kind="TPU v5e"))
    assert [form(q, name) for name in ("auto", "pallas", "xla")] == ["pallas", "pallas", "xla"]
    assert [form(short, name) for name in ("auto", "pallas")] == ["xla", "pallas"]
