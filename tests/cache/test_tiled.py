"""Decoding by `TiledCache`, its kernel in interpret mode, equals the forward of the whole text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.cache import DenseCache, TiledCache, abstract_cache, tiled
from llm_jax.cache.tiled import abstract_tiled, tile_of, why_not_tiled
from llm_jax.config import ModelConfig
from llm_jax.infer.steps import make_forward, make_prefill
from llm_jax.models import describe, init_params
from llm_jax.models.key_heads import repeat_key_heads
from llm_jax.ops.attention import AttentionOptions, FullContext
from llm_jax.sharding import make_mesh, zeros

pytestmark = pytest.mark.lenient  # jax's simulator promotes
VOCAB, B, T = 64, 4, 48
LENGTHS = np.array([30, 1, 17, 40])
WINDOWS = {"full": (), "mixed": (16, 0), "window": (16, 16)}


def config(windows=(), **changes):
    settings = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 16, "mlp_dim": 96, "max_positions": 64}
    return ModelConfig("llama", VOCAB, 2, 64, windows=windows, **(settings | changes))


def empty(model, mesh, size=T):
    return zeros(abstract_tiled(model.config, B, size, mesh))


@pytest.fixture
def interpreted(monkeypatch):
    attention = functools.partial(tiled.contiguous_attention, interpret=True)
    monkeypatch.setattr(tiled, "contiguous_attention", attention)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("windows", "mesh"),
    [
        ("mixed", ""),
        pytest.param("full", "", marks=pytest.mark.slow),
        pytest.param("window", "", marks=pytest.mark.slow),
        pytest.param("full", "tensor:8", marks=pytest.mark.slow),
        pytest.param("mixed", "data:2,tensor:2", marks=pytest.mark.slow),
    ],
)
def test_decoding_equals_the_whole_forward(windows, mesh):
    model, mesh = describe(config(WINDOWS[windows])), make_mesh(mesh)
    params = init_params(model, mesh, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, VOCAB)
    rows = np.arange(B)
    with jax.set_mesh(mesh):
        net = lambda params: model.bind(params)  # noqa: E731
        positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))

        @jax.jit
        def full(params):
            hidden, _ = net(params)(tokens, positions, FullContext(jnp.ones((B, T), jnp.int32)))
            return net(params).unembed(hidden)

        expected = np.asarray(full(params))
        params, cache = repeat_key_heads(params, model, mesh), empty(model, mesh)
        logits, cache = make_prefill(model)(params, cache, tokens[:, :40], jnp.asarray(LENGTHS))
        np.testing.assert_allclose(logits, expected[rows, LENGTHS - 1], atol=2e-5)
        for step in range(3):
            at = LENGTHS + step
            logits, cache = make_forward(model)(params, cache, np.asarray(tokens)[rows, at])
            np.testing.assert_allclose(logits, expected[rows, at], atol=2e-5)
        np.testing.assert_array_equal(cache.length, LENGTHS + 3)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.slow
def test_tiles_with_room_for_more_heads(monkeypatch):
    monkeypatch.setattr(tiled, "kind_of", lambda mesh: "TPU v5e")
    assert empty(describe(config()), make_mesh("")).full.shape[-1] == 128  # of 16 x 4
    test_decoding_equals_the_whole_forward("mixed", "")


def test_rows_move():
    model, mesh = describe(config(WINDOWS["mixed"])), make_mesh("")
    shapes = empty(model, mesh)
    rng = np.random.default_rng(0)
    cache = jax.tree.map(lambda x: jnp.asarray(rng.integers(0, 99, x.shape), x.dtype), shapes)
    picked = np.array([2, 2, 0])
    within = cache.take_within(jnp.array([[1, 1], [1, 0]]))
    taken = cache.take(jnp.asarray(picked))
    trees = (jax.tree.map(np.asarray, x) for x in (cache, taken, within))
    for old, new, moved in zip(*map(jax.tree.leaves, trees), strict=True):
        axis = 0 if old.ndim == 1 else 1
        np.testing.assert_array_equal(new, np.take(old, picked, axis))
        np.testing.assert_array_equal(moved, np.take(old, [1, 1, 3, 2], axis))


def test_tiles_are_for_tpus_and_models_that_the_kernel_serves(monkeypatch):
    mesh = make_mesh("")
    chosen = functools.partial(abstract_cache, batch=2, size=64)
    assert isinstance(chosen(describe(config()).config, mesh=mesh), DenseCache)
    assert tile_of(describe(config()).config, 64) == 128
    assert tile_of(describe(config((48, 0))).config, 64) == 16
    reasons = {
        "windows=(20, 0) are": {"windows": (20, 0)},
        "head_dim=8 is": {"head_dim": 8},
        "not compute_dtype='float16'": {"compute_dtype": "float16"},
    }
    for reason, changes in reasons.items():
        assert reason in why_not_tiled(describe(config(**changes)).config, 64)
    assert not why_not_tiled(describe(config()).config, 64)
    with pytest.raises(ValueError, match="attention='pallas': there is no kernel for cpu"):
        chosen(describe(config(attention="pallas")).config, mesh=mesh)
    monkeypatch.setattr("llm_jax.cache.choice.kernel_refusal", lambda *_: "")  # as where there is one
    assert isinstance(chosen(describe(config()).config, mesh=mesh), TiledCache)
    odd = describe(config(num_heads=6, num_kv_heads=2)).config
    assert isinstance(chosen(odd, mesh=make_mesh("tensor:4")), DenseCache), "lanes divide, heads do not"
    cache = abstract_tiled(describe(config((16, 0))).config, 2, 64, mesh)
    assert isinstance(cache, TiledCache)
    assert cache.ring.shape == (1, 2, 1, 2, 16, 64) and cache.full.shape == (1, 2, 4, 2, 16, 64)


def test_several_new_tokens_are_refused():
    cache = empty(describe(config()), make_mesh(""))
    x = jnp.zeros((B, 2, 8, 16))
    how = {"window": 0, "options": AttentionOptions(causal=True, scale=1.0)}
    with pytest.raises(ValueError, match="2 new tokens a row"):
        cache.attend(0, x, x, x, positions=jnp.zeros((B, 2), jnp.int32), **how)
