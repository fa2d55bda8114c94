"""A cache must not change what the model says: decoding equals the forward pass over the whole text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.cache import init_cache
from llm_jax.config import ModelConfig
from llm_jax.models import describe, init_params
from llm_jax.models.key_heads import repeat_key_heads
from llm_jax.ops.attention import FullContext
from llm_jax.sharding import make_mesh
from llm_jax.tree import unstack

B, T, VOCAB = 4, 12, 250
LENGTHS = np.array([7, 3, 5, 6])


def config(windows=()):
    settings = {"embed_dim": 64, "num_heads": 8, "num_kv_heads": 4, "head_dim": 8, "mlp_dim": 96}
    settings |= {"num_layers": len(windows) or 2, "max_positions": 64, "local_rope_theta": 1e3}
    return ModelConfig("llama", VOCAB, windows=windows, **settings)


def run(model, mesh, per_layer, tokens):
    """Logits of the whole text, and of prompt, two single tokens and a chunk of three by the cache."""
    trained = init_params(model, mesh, jax.random.key(0))
    params = repeat_key_heads(trained, model, mesh)
    if per_layer:
        params = dict(params, layers=unstack(params["layers"]))
    positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))

    @jax.jit
    def full(params):
        net = model.bind(params)
        hidden, _ = net(tokens, positions, FullContext(jnp.ones((B, T), jnp.int32)))
        return net.unembed(hidden)

    @jax.jit
    def prefill(params, cache, tokens, lengths):
        net = model.bind(params)
        hidden, context = net(tokens, positions[:, : tokens.shape[1]], cache.prefill(lengths))
        return net.unembed(hidden), context.done()

    @jax.jit
    def more(params, cache, tokens):
        net = model.bind(params)
        n = tokens.shape[1]
        hidden, cache = net(tokens, cache.length[:, None] + jnp.arange(n)[None], cache)
        return net.unembed(hidden), cache.advance(n)

    rows = np.arange(B)
    with jax.set_mesh(mesh):
        expected = np.asarray(full(trained))
        cache = init_cache(model.config, B, 32, mesh, per_layer=per_layer)
        logits, cache = prefill(params, cache, tokens[:, :8], jnp.asarray(LENGTHS))
        pairs = [(np.asarray(logits)[rows, LENGTHS - 1], expected[rows, LENGTHS - 1])]
        for start, n in ((0, 1), (1, 1), (2, 3)):
            at = LENGTHS[:, None] + start + np.arange(n)[None]
            logits, cache = more(params, cache, np.asarray(tokens)[rows[:, None], at])
            pairs.append((np.asarray(logits), expected[rows[:, None], at]))
    return pairs, cache


@pytest.mark.parametrize("windows", [(), (4, 4, 0, 4), (4, 4)], ids=["full", "mixed", "window"])
@pytest.mark.parametrize(
    "mesh, per_layer",
    [("", False), ("", True), ("data:2,fsdp:2,tensor:2", False), ("tensor:8", False)],
    ids=["one device", "one device, layers apart", "2x2x2", "more shards than kv heads"],
)
def test_decoding_equals_the_whole_forward(windows, mesh, per_layer):
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, VOCAB)
    pairs, _ = run(describe(config(windows)), make_mesh(mesh), per_layer, tokens)
    for ours, expected in pairs:  # float32: sums of 64 to 96 terms in another order
        np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_window_layers_keep_only_their_window():
    cache = init_cache(describe(config((4, 4, 0, 4))).config, B, 64, make_mesh(""))
    assert cache.ring[0].shape == (3, B, 4, 4, 8)
    assert cache.full[0].shape == (1, B, 4, 64, 8)
    everything_fits = init_cache(describe(config((4,) * 4)).config, B, 4, make_mesh(""))
    assert everything_fits.ring is None


def test_take_reorders_rows():
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, VOCAB)
    _, cache = run(describe(config((4, 4, 0, 4))), make_mesh(""), False, tokens)
    rows = jnp.array([2, 2, 0])
    taken = cache.take(rows)
    np.testing.assert_array_equal(taken.length, np.asarray(cache.length)[np.asarray(rows)])
    for old, new in zip(jax.tree.leaves(cache.full), jax.tree.leaves(taken.full), strict=True):
        np.testing.assert_array_equal(new, np.asarray(old)[:, np.asarray(rows)])


def test_windows_of_several_sizes_are_refused():
    with pytest.raises(ValueError, match="windows.*share one size"):
        init_cache(describe(config((4, 8, 0, 4))).config, B, 64, make_mesh(""))
