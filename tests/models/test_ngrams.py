"""Hashed n-gram embeddings: which rows are looked up, and that each is used as the table has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.checkpoint.hf import export_hf
from llm_jax.config import ModelConfig
from llm_jax.models import describe, init_params
from llm_jax.models.layers import NgramEmbed, ngram_rows
from llm_jax.ops.attention import FullContext
from llm_jax.sharding import make_mesh

BUCKETS = 64
SIZES = {
    "vocab_size": 31,
    "num_layers": 2,
    "embed_dim": 16,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 24,
    "max_positions": 16,
    "causal": False,
    "head": "embedding",
    "pooling": "mean",
    "ngram_orders": (2, 3),
    "ngram_buckets": BUCKETS,
}


def rows_of(tokens, positions, orders=(2, 3), buckets=BUCKETS):
    rows, whole = ngram_rows(jnp.asarray(tokens), jnp.asarray(positions), orders, buckets)
    return np.asarray(rows), np.asarray(whole)


def test_a_row_depends_on_its_ngram_alone():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 9, (20, 30)).astype(np.int32)  # few ids, so that n-grams come again
    rows, whole = rows_of(tokens, np.tile(np.arange(30, dtype=np.int32), (20, 1)))
    for o, order in enumerate((2, 3)):
        of = {}
        for b, t in np.argwhere(whole[..., o]):
            of.setdefault(tuple(tokens[b, t - order + 1 : t + 1]), set()).add(rows[b, t, o])
        assert all(len(found) == 1 for found in of.values())
        found = np.array([next(iter(x)) for x in of.values()])
        assert found.min() >= o * BUCKETS and found.max() < (o + 1) * BUCKETS
        turned = [of[gram] != of[gram[::-1]] for gram in of if gram[::-1] in of and gram != gram[::-1]]
        assert np.mean(turned) > 0.9, "the order of the tokens counts"


def test_the_hash_fills_the_buckets_evenly():
    pairs = np.stack(np.meshgrid(np.arange(300), np.arange(300)), -1).reshape(-1, 2).astype(np.int32)
    rows, _ = rows_of(pairs, np.tile([[0, 1]], (len(pairs), 1)), orders=(2,), buckets=1000)
    counts = np.bincount(rows[:, 1, 0], minlength=1000)
    # 90,000 pairs in 1,000 buckets: mean 90, standard deviation 9.5 if they fall at random
    assert counts.std() < 12 and counts.min() > 40 and counts.max() < 140


def test_no_ngram_reaches_into_another_document():
    tokens = np.array([[5, 6, 7, 5, 6, 7]], np.int32)
    _, whole = rows_of(tokens, np.array([[0, 1, 2, 0, 1, 2]], np.int32))
    np.testing.assert_array_equal(whole[0, :, 0], [False, True, True, False, True, True])
    np.testing.assert_array_equal(whole[0, :, 1], [False, False, True, False, False, True])


def forward(tokens, positions, key=None, rate=0.0):
    """NgramEmbed of a table whose row r is r + 1 in every column."""
    model = describe(ModelConfig("llama", **SIZES, ngram_dropout=rate))
    rows = 1.0 + np.arange(2 * BUCKETS, dtype=np.float32)
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), model.shapes)
    params["ngrams"]["table"] = jnp.asarray(np.tile(rows[:, None], (1, SIZES["embed_dim"])))

    def run(params):
        module = model.bind(params).ngrams
        assert isinstance(module, NgramEmbed)
        return module(tokens, positions, FullContext(jnp.ones_like(tokens), key))

    return np.asarray(jax.jit(run)(params))


def test_the_sum_of_the_ngrams_is_added():
    tokens = jnp.asarray([[5, 6, 7, 8]], jnp.int32)
    positions = jnp.arange(4, dtype=jnp.int32)[None]
    rows, whole = rows_of(tokens, positions)
    want = ((rows + 1.0) * whole).sum(-1)[..., None]
    np.testing.assert_array_equal(forward(tokens, positions), np.broadcast_to(want, (1, 4, 16)))


def test_dropout_drops_whole_ngrams_and_only_while_training():
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 31, (8, 16)), jnp.int32)
    positions = jnp.tile(jnp.arange(16, dtype=jnp.int32), (8, 1))
    rows, whole = rows_of(tokens, positions)
    plain = forward(tokens, positions, rate=0.75)
    np.testing.assert_array_equal(plain, forward(tokens, positions))
    dropped = forward(tokens, positions, jax.random.key(0), rate=0.75)
    np.testing.assert_array_equal(dropped, np.broadcast_to(dropped[..., :1], dropped.shape))
    two, three = np.moveaxis((rows + 1.0) * whole, -1, 0)
    each = np.stack([np.zeros_like(two), 4 * two, 4 * three, 4 * (two + three)], -1)
    kind = np.abs(each - dropped[..., :1]).argmin(-1)
    np.testing.assert_allclose(
        np.take_along_axis(each, kind[..., None], -1), dropped[..., :1], rtol=1e-6
    )
    full = whole.all(-1)  # where both are there: each stays with probability 1/4
    assert 0.4 < (kind[full] == 0).mean() < 0.72 and set(kind[full]) == {0, 1, 2, 3}


def test_sharded_equals_unsharded():
    model = describe(ModelConfig("llama", **SIZES))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 31, (4, 8)).astype(np.int32)
    positions = np.tile(np.arange(8, dtype=np.int32), (4, 1))

    def run(params):
        context = FullContext(jnp.ones_like(tokens))
        return model.bind(params)(jnp.asarray(tokens), jnp.asarray(positions), context)[0]

    results = []
    for name in ("data:1", "data:2,fsdp:2,tensor:2"):
        mesh = make_mesh(name)
        params = init_params(model, mesh, jax.random.key(0))
        with jax.set_mesh(mesh):
            results.append(np.asarray(jax.jit(run)(params)))
    assert len(params["ngrams"]["table"].addressable_shards) == 8
    np.testing.assert_allclose(*results, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"causal": True, "head": "lm"}, "ngram_orders"),
        ({"ngram_buckets": 0}, "ngram_buckets=0"),
        ({"ngram_orders": (1, 2)}, "2 or more"),
        ({"ngram_dropout": 1.0}, "ngram_dropout=1.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig("llama", **SIZES | change)


def test_export_names_what_transformers_has_no_place_for(tmp_path):
    model = describe(ModelConfig("llama", **SIZES))
    params = init_params(model, make_mesh("data:1"), jax.random.key(0))
    with pytest.raises(ValueError, match="cannot have .*ngram_orders"):
        export_hf(tmp_path / "out", model, params)
    assert not (tmp_path / "out").exists()
