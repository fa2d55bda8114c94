"""Tokens that come in pieces of any size, of many sequences in a step, equal the forward of the text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.cache import paged  # whose kernel is replaced
from llm_jax.cache.paged import (
    abstract_paged,
    copy_pages,
    init_paged,
    page_bytes,
    pool_windows,
    put_pages,
    take_pages,
)
from llm_jax.config import ModelConfig
from llm_jax.infer.paged_steps import StepShape, make_paged_forward
from llm_jax.kernels.paged_attention.types import heads_held
from llm_jax.models import describe, init_params
from llm_jax.models.key_heads import repeat_key_heads
from llm_jax.ops.attention import FullContext
from llm_jax.sharding import data_shards, make_mesh
from llm_jax.tree import num_bytes

SLOW = pytest.mark.slow
VOCAB, TOKENS, PAGE = 64, 40, 8
WINDOWS = {"full": (), "mixed": (16, 0), "window": (16, 16)}
# Of each step, how many tokens of each sequence; those with one come first.
STEPS = [
    {0: 17, 1: 9, 2: 1},
    {2: 1, 3: 1, 0: 3, 1: 16},
    {0: 1, 1: 1, 2: 1, 3: 1},
    {2: 1, 3: 20, 0: 2},
    {0: 1, 1: 1, 2: 1, 3: 1},
]


def config(windows=(), **changes):
    settings = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 16, "mlp_dim": 96, "max_positions": 64}
    return ModelConfig("llama", VOCAB, 2, 64, windows=windows, **(settings | changes))


def whole(model, params, tokens):
    """Logits [B, T, V] of whole texts."""

    @jax.jit
    def full(params):
        net = model.bind(params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        return net.unembed(net(tokens, positions, FullContext(jnp.ones_like(tokens)))[0])

    return np.asarray(full(params))


def packed_step(shape, shards, tables, tokens, done, counts):
    """`packed` of a step that takes counts {sequence: tokens} after `done` ones, on every shard."""
    packed, parts = shape.empty(shards)
    order = sorted(counts, key=lambda s: counts[s] > 1)
    singles = sum(counts[s] == 1 for s in order)
    at = 0
    for row, s in enumerate(order):
        at = row if row < singles else -(-at // 16) * 16
        count = counts[s]
        for shard in range(shards):
            text = tokens[shard * 4 + s]
            parts["tokens"][shard, at : at + count] = text[done[s] : done[s] + count]
            for pool, table in enumerate(tables):
                parts[f"table{pool}"][shard, row] = table[shard, s]
        parts["starts"][:, row], parts["counts"][:, row] = at, count
        parts["lengths"][:, row] = done[s] + count
        parts["at"][:, row] = at + count - 1
        at += count
    parts["decodes"][:], parts["rows"][:] = singles, len(order)
    return packed, order


@pytest.mark.parametrize(
    ("windows", "mesh", "dtype", "bound"),
    [
        ("mixed", "", None, 2e-5),
        ("mixed", "data:2,tensor:4", None, 2e-5),
        pytest.param("full", "", None, 2e-5, marks=SLOW),
        pytest.param("window", "", None, 2e-5, marks=SLOW),
        pytest.param("mixed", "tensor:8", None, 2e-5, marks=SLOW),
        # Logits are about 1; numbers are rounded to 1/254 of their head's largest, or to 1/16.
        ("mixed", "", jnp.int8, 0.1),
        pytest.param("full", "data:2,tensor:2", jnp.int8, 0.1, marks=SLOW),
        pytest.param("full", "", jnp.float8_e4m3fn, 0.5, marks=SLOW),
    ],
)
def test_pieces_of_texts_equal_the_whole_forward(windows, mesh, dtype, bound):
    model, mesh = describe(config(WINDOWS[windows])), make_mesh(mesh)
    shards, page = data_shards(mesh), PAGE if dtype is None else 16
    params = init_params(model, mesh, jax.random.key(0))
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (4 * shards, TOKENS), 0, VOCAB))
    expected = whole(model, params, tokens)
    params = repeat_key_heads(params, model, mesh)
    pools, per_row = len(pool_windows(model.config)), -(-TOKENS // page)
    rng = np.random.default_rng(0)
    tables = [
        np.stack([1 + rng.permutation(4 * per_row).reshape(4, per_row) for _ in range(shards)])
        for _ in range(pools)
    ]
    done = np.zeros(4, int)
    with jax.set_mesh(mesh):
        cache = init_paged(model.config, (4 * per_row + 1,) * pools, page, mesh, dtype)
        newest = jnp.zeros((shards, 4, 1), jnp.int32)
        for counts in STEPS:
            longest = max(counts.values())
            shape = StepShape(4 if longest == 1 else 64, 4, 4, per_row, pools)
            packed, order = packed_step(shape, shards, tables, tokens, done, counts)
            found = make_paged_forward(model, shape)(params, cache, newest, packed)
            logits, cache = found.logits, found.cache
            for row, s in enumerate(order):
                done[s] += counts[s]
                got, wanted = logits[:, row], expected[np.arange(shards) * 4 + s, done[s] - 1]
                np.testing.assert_allclose(got, wanted, atol=bound)
    assert done.tolist() == [24, 27, 5, 23]


@pytest.mark.parametrize(
    ("mesh", "dtype", "bound"), [("", None, 2e-5), ("data:2,tensor:4", jnp.int8, 0.1)]
)
def test_pages_with_room_for_more_heads(monkeypatch, mesh, dtype, bound):
    """As TPUs have them, by XLA; see also `test_the_kernel_of_tpus`."""
    monkeypatch.setattr(paged, "kind_of", lambda mesh: "TPU v5e")
    pools = abstract_paged(describe(config()).config, (3,), 16, make_mesh(mesh), dtype).pools
    shard = pools[0].tokens.sharding.shard_shape(pools[0].tokens.shape)
    assert shard[-1] == 128  # of 16 x 4, or 16 x 1
    test_pieces_of_texts_equal_the_whole_forward("mixed", mesh, dtype, bound)


def test_heads_fill_the_lanes_of_tpus_only():
    assert [heads_held(n, 64, "TPU v6e") for n in (1, 2, 3, 25)] == [2, 2, 4, 26]
    assert [heads_held(8, dim, "TPU7x") for dim in (80, 96, 128, 256)] == [8, 8, 8, 8]
    assert heads_held(3, 80, "TPU v4") == 8
    assert heads_held(25, 64, "cpu") == heads_held(25, 64, "NVIDIA H100") == 25


def test_tokens_that_the_host_does_not_know_come_from_the_device():
    model, mesh = describe(config()), make_mesh("")
    params = init_params(model, mesh, jax.random.key(0))
    shape = StepShape(2, 2, 2, 2, 1)
    results = []
    for given, last in (([7, 3], [0, 0]), ([7, -2], [9, 3])):
        packed, parts = shape.empty(1)
        parts["tokens"][:], parts["table0"][:] = given, [[1, 0], [2, 0]]
        parts["starts"][:], parts["lengths"][:], parts["at"][:] = [0, 1], [1, 1], [0, 1]
        parts["decodes"][:] = parts["rows"][:] = 2
        cache = init_paged(model.config, (3,), PAGE, mesh)
        forward = make_paged_forward(model, shape)
        newest = jnp.asarray(last, jnp.int32).reshape(1, 2, 1)
        results.append(forward(params, cache, newest, packed).logits)
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("mesh", ["", "data:2,tensor:4"])
def test_pages_are_copied_and_go_to_the_host_and_back(mesh):
    mesh, model = make_mesh(mesh), describe(config(WINDOWS["mixed"]))
    shards, rng = data_shards(mesh), np.random.default_rng(0)
    with jax.set_mesh(mesh):
        empty = init_paged(model.config, (6, 4), 16, mesh, jnp.int8)
        fill = lambda x: jax.device_put(  # noqa: E731
            rng.integers(-99, 99, x.shape).astype(x.dtype), x.sharding
        )
        cache = jax.tree.map(fill, empty)
        before = jax.tree.map(np.asarray, cache)
        source, target = ([[n] * shards for n in numbers] for numbers in ((1, 2), (3, 4)))
        source, target = np.array(source).T, np.array(target).T
        copied = jax.jit(copy_pages, static_argnums=1)(cache, 0, source, target)
        content = jax.tree.map(np.asarray, jax.jit(take_pages, static_argnums=1)(cache, 1, source))
        returned = jax.jit(put_pages, static_argnums=1)(empty, 1, target - 1, content)
    for old, new in zip(*(jax.tree.leaves(x.pools[0]) for x in (before, copied)), strict=True):
        split = lambda x: np.asarray(x).reshape(x.shape[0], shards, -1, *x.shape[2:])  # noqa: E731
        np.testing.assert_array_equal(split(new)[:, :, [1, 2, 3, 4]], split(old)[:, :, [1, 2, 1, 2]])
    for old, new in zip(*(jax.tree.leaves(x.pools[1]) for x in (before, returned)), strict=True):
        np.testing.assert_array_equal(split(new)[:, :, [2, 3]], split(old)[:, :, [1, 2]])


def test_sizes_and_what_is_refused():
    mesh, mixed = make_mesh("data:2,tensor:4"), describe(config(WINDOWS["mixed"])).config
    abstract = abstract_paged(mixed, (10, 5), 16, mesh, jnp.int8)
    sizes = page_bytes(mixed, 16, mesh, jnp.int8)
    per_device = sum(count * size for count, size in zip((10, 5), sizes, strict=True))
    assert num_bytes(abstract) == 8 * per_device
    assert all(x.sharding.shard_shape(x.shape)[1] == x.shape[1] // 2 for x in jax.tree.leaves(abstract))
    with pytest.raises(ValueError, match=r"windows=\(8, 16\): expected one size"):
        pool_windows(describe(config((8, 16))).config)
    odd = describe(config(num_heads=6, num_kv_heads=2)).config
    with pytest.raises(ValueError, match="tensor=4 does not divide num_heads=6"):
        abstract_paged(odd, (10,), 16, mesh)
    with pytest.raises(ValueError, match="dtype=float16: pages are of"):
        abstract_paged(mixed, (10, 5), 16, mesh, jnp.float16)


@SLOW
@pytest.mark.lenient  # jax's simulator promotes
def test_the_kernel_of_tpus(monkeypatch):
    def interpreted(*args, implementation, **options):
        return attention(*args, implementation="pallas", interpret=True, **options)

    attention = paged.paged_attention
    monkeypatch.setattr(paged, "paged_attention", interpreted)
    make_paged_forward.cache_clear()
    test_pieces_of_texts_equal_the_whole_forward("mixed", "", None, 2e-5)
    monkeypatch.setattr(paged, "kind_of", lambda mesh: "TPU v5e")  # pages with room for more heads
    test_pieces_of_texts_equal_the_whole_forward("mixed", "", None, 2e-5)
    make_paged_forward.cache_clear()
