"""Paged attention in interpret mode beside float64 in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.kernels.chips import RULES
from llm_jax.kernels.paged_attention.api import (
    Sizes,
    choose,
    paged_attention,
    quantize_tokens,
    size_rule,
)
from llm_jax.kernels.paged_attention.scales import scale_places, scale_rows
from llm_jax.kernels.paged_attention.tpu_chunk import ChunkSizes
from llm_jax.kernels.paged_attention.tpu_decode import DecodeSizes
from llm_jax.kernels.paged_attention.types import Pages, Rows, abstract_pages, init_pages
from llm_jax.tpu.races import run_checked

SLOW = pytest.mark.slow
pytestmark = pytest.mark.lenient  # jax's simulator promotes


def batch(counts, past, page, room=0, seed=0):
    """(Rows, tokens of the step, how many pages there are); rows of one token come first."""
    counts, past = np.array(counts, np.int32), np.array(past, np.int32)
    singles = 0
    while singles < len(counts) and counts[singles] == 1:
        singles += 1
    starts, at = [], 0
    for i, count in enumerate(counts):
        at = at if i < singles else -(-at // 16) * 16
        starts.append(at)
        at += count
    count = len(counts) if singles == len(counts) else -(-at // 16) * 16 + room
    lengths = counts + past
    per_row = -(-int(lengths.max()) // page)
    pool = len(counts) * per_row + 1
    table = np.random.default_rng(seed).permutation(pool)[: len(counts) * per_row]
    rows = Rows(
        table=table.reshape(len(counts), per_row).astype(np.int32),
        starts=np.array(starts, np.int32),
        counts=counts,
        lengths=lengths.astype(np.int32),
        decodes=np.int32(singles),
        rows=np.int32(len(counts)),
    )
    return rows, int(max(count, len(counts))), pool


def floats(x):
    return np.asarray(jnp.asarray(x).astype(jnp.float32), np.float64)


def unpacked(pages: Pages, kv_heads):
    """(tokens [L, P, 2, Z, K, H] as numbers with their scales, scales [L, P, 2, K, Z] or None)."""
    tokens = floats(pages.tokens)
    tokens = tokens.reshape(*tokens.shape[:-1], kv_heads, -1)
    if pages.scales is None:
        return tokens, None
    row, lane = scale_places(kv_heads, pages.page_size)
    scales = np.asarray(pages.scales, np.float64)[:, :, row, lane]
    return tokens * scales.swapaxes(3, 4)[..., None], scales


def exact(q, k, v, pages, rows, layer, scale, window, softcap):
    """(attention [T, N, H], pages [L, P, 2, Z, K, H]) in float64, token by token."""
    q, (tokens, _) = floats(q), unpacked(pages, k.shape[1])
    count, heads, dim = q.shape
    kv_heads, page = k.shape[1], pages.page_size
    new, scales = quantize_tokens(jnp.stack([k, v], axis=1), pages.tokens.dtype)
    new = floats(new) if scales is None else floats(new) * np.asarray(scales, np.float64)[..., None]
    if scales is None:
        new = floats(jnp.asarray(new).astype(pages.tokens.dtype))
    tokens, out = tokens.copy(), np.zeros((count, heads, dim))
    for r in range(int(rows.rows)):
        for i in range(rows.counts[r]):
            place = rows.lengths[r] - rows.counts[r] + i
            tokens[layer, rows.table[r, place // page], :, place % page] = new[rows.starts[r] + i]
    for r in range(int(rows.rows)):
        found = tokens[layer, rows.table[r]].transpose(1, 0, 2, 3, 4).reshape(2, -1, kv_heads, dim)
        for i in range(rows.counts[r]):
            place, token = rows.lengths[r] - rows.counts[r] + i, rows.starts[r] + i
            seen = slice(max(0, place - window + 1) if window else 0, place + 1)
            for n in range(heads):
                keys, values = found[:, seen, n // (heads // kv_heads)]
                scores = keys @ q[token, n] * scale
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                out[token, n] = weights @ values / weights.sum()
    return out, tokens


def drawn(rows, count, pool, heads, kv_heads, dim, page, dtype, layers=2, q_dtype=jnp.float32, seed=0):
    """q, k, v and pages that are full of numbers, in all layers."""
    rng = np.random.default_rng(seed)
    q, k, v = (
        jnp.asarray(rng.standard_normal((count, n, dim)), q_dtype) for n in (heads, kv_heads, kv_heads)
    )
    shapes = abstract_pages(layers, pool, page, kv_heads, dim, dtype)
    tokens = rng.standard_normal(shapes.tokens.shape) * (30 if shapes.scales is not None else 1)
    scales = shapes.scales and jnp.asarray(rng.random(shapes.scales.shape) * 0.03, jnp.float32)
    tokens = np.round(tokens) if dtype == jnp.int8 else tokens
    return q, k, v, Pages(jnp.asarray(tokens).astype(dtype), scales)


def compare(
    counts,
    past,
    *,
    heads=4,
    kv_heads=2,
    dim=64,
    page=16,
    dtype=jnp.float32,
    q_dtype=jnp.float32,
    window=0,
    softcap=0.0,
    atol=2e-6,
    implementation="pallas",
    sizes=None,
    checked=False,
    room=0,
):
    rows, count, pool = batch(counts, past, page, room)
    q, k, v, pages = drawn(rows, count, pool, heads, kv_heads, dim, page, dtype, q_dtype=q_dtype)
    sizes = sizes or Sizes(DecodeSizes(2, 3), ChunkSizes(32, 2, 2))
    kernel = implementation == "pallas"

    def run(q, k, v, pages, window):
        return paged_attention(
            q,
            k,
            v,
            pages,
            rows,
            1,
            scale=dim**-0.5,
            window=window,
            softcap=softcap,
            implementation=implementation,
            sizes=sizes if kernel else None,
            interpret=kernel,
        )

    rows = jax.tree.map(jnp.asarray, rows)
    args = (q, k, v, pages, jnp.int32(window))
    got, kept = run_checked(run, *args) if checked else jax.jit(run)(*args)
    host = jax.tree.map(np.asarray, rows)
    wanted, wanted_pages = exact(q, k, v, pages, host, 1, dim**-0.5, window, softcap)
    np.testing.assert_allclose(floats(got), wanted, atol=atol * max(1.0, np.abs(wanted).max()))
    assert got.dtype == q.dtype
    np.testing.assert_allclose(unpacked(kept, kv_heads)[0], wanted_pages, rtol=1e-6, atol=1e-6)


MIXES = {
    "single tokens": ((1, 1, 1), (40, 0, 95)),
    "chunks": ((5, 40, 16), (3, 16, 31)),
    "both": ((1, 1, 33, 7), (20, 47, 0, 90)),
}


@pytest.mark.parametrize(
    "mix", [*list(MIXES)[:1], pytest.param("chunks", marks=pytest.mark.slow), "both"]
)
def test_rows_of_one_and_of_many_new_tokens(mix):
    compare(*MIXES[mix])


@pytest.mark.parametrize("mix", MIXES)
def test_the_same_by_xla(mix):
    compare(*MIXES[mix], implementation="xla")


@pytest.mark.parametrize("implementation", [pytest.param("pallas", marks=SLOW), "xla"])
def test_a_window_and_a_soft_cap(implementation):
    compare(*MIXES["both"], window=20, softcap=2.0, implementation=implementation)


@pytest.mark.parametrize(
    ("dtype", "page"),
    [(jnp.int8, 16), (jnp.float8_e4m3fn, 32), (jnp.float8_e5m2, 128), (jnp.int8, 256)],
    ids=str,
)
@pytest.mark.slow
def test_pages_of_eight_bits(dtype, page):
    pages = max(1, 128 // page)
    compare(
        *MIXES["both"],
        dtype=dtype,
        page=page,
        sizes=Sizes(DecodeSizes(pages, 3), ChunkSizes(32, pages, 2)),
    )


@pytest.mark.parametrize("page", [64, 128])
def test_single_tokens_and_pages_of_eight_bits(page):
    pages = 128 // page
    sizes = Sizes(DecodeSizes(pages, 2), ChunkSizes(32, pages, 2))
    compare(*MIXES["single tokens"], dtype=jnp.int8, page=page, sizes=sizes)


@pytest.mark.parametrize("page", [16, 128])
def test_pages_of_eight_bits_by_xla(page):
    compare(*MIXES["both"], dtype=jnp.int8, page=page, implementation="xla")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(4, 4, 64), (3, 1, 128), (8, 2, 80), (6, 3, 48), (2, 1, 256)], ids=str
)
def test_heads_that_do_not_fill_lanes(heads, kv_heads, dim):
    compare(*MIXES["both"], heads=heads, kv_heads=kv_heads, dim=dim)


def test_single_tokens_of_heads_that_do_not_fill_lanes():
    compare(*MIXES["single tokens"], heads=6, kv_heads=3, dim=48)


@pytest.mark.slow
def test_bfloat16_is_near():
    compare(*MIXES["both"], q_dtype=jnp.bfloat16, dtype=jnp.bfloat16, atol=0.01)


@pytest.mark.slow
def test_two_cores_share_rows_and_heads(monkeypatch):
    rule = functools.partial(lambda interpret=False: RULES["TPU v4"])
    monkeypatch.setattr("llm_jax.kernels.paged_attention.api.chip_rule", rule)
    compare(*MIXES["both"], kv_heads=4, dim=64)  # heads divided
    compare(*MIXES["both"], kv_heads=1, dim=64)  # not, for one head


@pytest.mark.parametrize(
    "mix", ["single tokens", *(pytest.param(mix, marks=SLOW) for mix in ("chunks", "both"))]
)
def test_no_buffer_is_used_while_a_dma_uses_it(mix):
    compare(*MIXES[mix], heads=2, kv_heads=1, checked=True)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_mix_of_rows(data):
    singles = data.draw(st.integers(0, 4))
    chunks = data.draw(st.lists(st.integers(2, 60), min_size=0 if singles else 1, max_size=3))
    counts = [1] * singles + chunks
    past = [data.draw(st.integers(0, 100)) for _ in counts]
    compare(
        counts,
        past,
        heads=2,
        kv_heads=1,
        dim=16,
        page=data.draw(st.sampled_from([8, 16, 64])),
        window=data.draw(st.sampled_from([0, 1, 30])),
        room=data.draw(st.sampled_from([0, 16])),
        sizes=Sizes(DecodeSizes(data.draw(st.integers(1, 4)), 2), ChunkSizes(32, 2, 3)),
    )


def test_rows_that_are_not_there_change_nothing():
    rows, _, pool = batch((1, 1, 1), (40, 0, 95), 16)
    q, k, v, pages = drawn(rows, 3, pool, 4, 2, 32, 16, jnp.float32)
    rows = jax.tree.map(jnp.asarray, rows)
    none = Rows(**{**vars(rows), "decodes": jnp.int32(0), "rows": jnp.int32(0)})
    out, kept = paged_attention(
        q, k, v, pages, none, 0, scale=1.0, implementation="pallas", interpret=True
    )
    assert np.all(np.asarray(out) == 0)
    np.testing.assert_array_equal(kept.tokens, pages.tokens)


@pytest.mark.parametrize("page", [16, 32, 64, 128, 384])
@pytest.mark.parametrize("kv_heads", [1, 3, 8])
def test_every_scale_has_a_place_of_its_own(page, kv_heads):
    row, lane = scale_places(kv_heads, page)
    places = set(zip(row.reshape(-1).tolist(), lane.reshape(-1).tolist(), strict=True))
    assert len(places) == 2 * kv_heads * page
    assert row.max() < scale_rows(kv_heads, page) and lane.max() < 128


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5e", "TPU v5p", "TPU v6e", "TPU7x"])
@pytest.mark.parametrize("shape", [(32, 8, 128), (4, 1, 128), (12, 12, 64), (64, 8, 128), (128, 8, 256)])
def test_blocks_fit_the_memory_of_every_chip(kind, shape):
    heads, kv_heads, dim = shape
    rows, count, _ = batch([1] * 4 + [1000], [5000] * 5, 16)
    pages = abstract_pages(1, 10_000, 16, kv_heads, dim, jnp.bfloat16)
    q = jax.ShapeDtypeStruct((count, heads, dim), jnp.bfloat16)
    found = size_rule(RULES[kind], q, pages, rows.table.shape[1])
    assert found.decode.pages_at_once * 16 % 128 == 0 and found.chunk.block_q % 128 == 0
    block = found.decode.pages_at_once * 16 * 2 * kv_heads * dim * 2
    assert found.decode.buffers * block <= RULES[kind].vmem_bytes * 5 // 8


def test_what_cannot_run_says_why():
    rows, count, pool = batch((1, 1), (3, 4), 16)
    q, k, v, pages = drawn(rows, count, pool, 4, 2, 32, 16, jnp.float32)
    rows = jax.tree.map(jnp.asarray, rows)
    assert choose(q, pages, rows, "cpu").implementation == choose(q, pages, rows).implementation == "xla"
    assert choose(q, pages, rows, "TPU v5e").implementation == "pallas"
    assert "float16" in choose(q.astype(jnp.float16), pages, rows, "TPU v5e").reason
    wide = Rows(**{**vars(rows), "table": jax.ShapeDtypeStruct((256, 1024), jnp.int32)})
    assert "larger pages" in choose(q, pages, wide, "TPU v5e").reason
    call = functools.partial(paged_attention, scale=1.0)
    with pytest.raises(ValueError, match="implementation='pallas': there is no kernel for cpu"):
        call(q, k, v, pages, rows, 0, implementation="pallas")
    with pytest.raises(ValueError, match="implementation='cuda'"):
        call(q, k, v, pages, rows, 0, implementation="cuda")
    with pytest.raises(ValueError, match=r"\[T, K, H\]"):
        call(q, k[0], v, pages, rows, 0)
    with pytest.raises(ValueError, match="does not fit k"):
        call(q[:, :3], k, v, pages, rows, 0)
    with pytest.raises(ValueError, match="expected \\[L, P, 2, Z, 64\\]"):
        call(q, k, v, Pages(pages.tokens[..., :32], None), rows, 0)
    with pytest.raises(ValueError, match="scales of None beside int8 pages"):
        call(q, k, v, Pages(pages.tokens.astype(jnp.int8), None), rows, 0)
    with pytest.raises(ValueError, match="expected as many tokens as rows"):
        call(*(jnp.concatenate([x, x[:1]]) for x in (q, k, v)), pages, rows, 0)
    with pytest.raises(ValueError, match="dtype=int32"):
        abstract_pages(1, 1, 16, 1, 128, jnp.int32)
    with pytest.raises(ValueError, match="page_size=12"):
        init_pages(1, 1, 12, 1, 128, dtype=jnp.float32)
    with pytest.raises(ValueError, match="page_size=48"):
        init_pages(1, 1, 48, 1, 128, dtype=jnp.int8)
