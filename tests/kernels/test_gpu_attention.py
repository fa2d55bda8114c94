"""The GPU's kernels of attention in interpret mode beside float64 in numpy; on a GPU, themselves."""

import functools
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.cache import TiledCache
from llm_jax.cache import choice as cache_choice
from llm_jax.config import ModelConfig
from llm_jax.kernels.chips import GPUS, gpu_rule
from llm_jax.kernels.choice import kernel_refusal
from llm_jax.kernels.flash_attention import gpu as flash_gpu
from llm_jax.kernels.flash_attention.api import choose, flash_attention
from llm_jax.kernels.flash_attention.tpu import FAR, Blocks, reach_of
from llm_jax.kernels.paged_attention import api as paged_api
from llm_jax.kernels.paged_attention import gpu as paged_gpu
from llm_jax.kernels.paged_attention.scales import scale_places
from llm_jax.kernels.paged_attention.types import Rows, abstract_pages, init_pages
from llm_jax.ops import attention
from llm_jax.sharding import make_mesh
from tests.kernels import test_flash_attention as flash
from tests.kernels import test_in_models as in_models
from tests.kernels import test_paged_attention as paged

pytestmark = pytest.mark.lenient  # numpy's indices promote
SLOW = pytest.mark.slow
TILE = flash_gpu.Tile(32, 16, 4, 2)
TILE_RULE = flash_gpu.tile_rule  # before it is replaced
TILES = flash_gpu.Tiles(TILE, flash_gpu.Tile(16, 32, 4, 2), TILE)


@pytest.fixture(autouse=True)
def by_gpu(monkeypatch, request):
    """Helpers of the TPU's tests take the GPU's kernels, in tiles of which short sequences have many."""
    if request.node.get_closest_marker("gpu"):
        return

    def changed(function):
        return lambda *args, interpret, **how: function(*args, interpret=interpret and "gpu", **how)

    monkeypatch.setattr(flash_gpu, "tile_rule", lambda *_: TILES)
    monkeypatch.setattr(flash, "flash_attention", changed(flash.flash_attention))
    monkeypatch.setattr(paged, "paged_attention", changed(paged.paged_attention))
    monkeypatch.setattr(paged_gpu, "decode_tile", lambda *_: paged_gpu.PagedTile(16, 16, 4, 2, 3))
    monkeypatch.setattr(paged_gpu, "chunk_tile", lambda *_: paged_gpu.PagedTile(32, 16, 4, 2))


def documents(batch, tokens, seed=3):
    """Positions and segments of packed documents, as `compare` takes them."""
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(1, 5, (batch, tokens)), axis=1).astype(np.int32)
    starts = np.array([[np.flatnonzero(row == s)[0] for s in row] for row in segments])
    positions = (np.arange(tokens) - starts).astype(np.int32)
    return {"positions": (positions, positions), "segments": (segments, segments)}


@pytest.mark.parametrize(
    ("shape", "mask"),
    [
        ((1, 100, 100, 4, 2, 64), {"causal": True}),
        ((1, 70, 70, 3, 3, 80), {"causal": True}),
        pytest.param((1, 40, 40, 8, 1, 16), {"causal": True}, marks=SLOW),
        pytest.param((1, 40, 40, 2, 1, 256), {"causal": True}, marks=SLOW),
        pytest.param((2, 64, 64, 2, 2, 32), {"causal": False}, marks=SLOW),
        ((1, 40, 130, 2, 1, 32), {"causal": False}),
        ((1, 50, 120, 2, 1, 32), {"causal": True, "offset": 70}),
        ((1, 100, 100, 2, 1, 32), {"causal": True, "window": 20, "softcap": 3.0}),
        pytest.param((1, 100, 100, 2, 1, 32), {"causal": False, "window": 20}, marks=SLOW),
        ((2, 100, 100, 2, 1, 32), {"causal": True, "window": 20, **documents(2, 100)}),
        pytest.param((2, 100, 100, 2, 1, 96), {"causal": True, **documents(2, 100)}, marks=SLOW),
    ],
    ids=lambda x: ",".join(map(str, x)),
)
def test_attention(shape, mask):
    flash.compare(shape, blocks=None, **mask)


def test_bfloat16_differs_by_its_own_roundings():
    flash.compare((1, 80, 80, 4, 2, 64), blocks=None, causal=True, dtype=jnp.bfloat16, atol=2e-2)


@pytest.mark.slow
@settings(max_examples=20)
@given(flash.ragged())
def test_any_shapes_and_masks(drawn_case):
    shape, mask = drawn_case
    flash.compare(shape, blocks=None, **mask)


@pytest.mark.parametrize(
    ("shape", "mask", "softcap"),
    [
        ((1, 100, 100, 4, 2, 32), {"causal": True}, 0.0),
        pytest.param((1, 70, 100, 4, 1, 80), {"causal": True, "offset": 30}, 0.0, marks=SLOW),
        pytest.param((1, 100, 100, 4, 1, 16), {"causal": True, "window": 20}, 4.0, marks=SLOW),
        pytest.param((1, 40, 90, 2, 2, 32), {"causal": False}, 4.0, marks=SLOW),
        ((2, 100, 100, 2, 2, 16), {"causal": True, "window": 30, **documents(2, 100)}, 4.0),
    ],
    ids=lambda x: str(x) if isinstance(x, float) else ",".join(map(str, x)),
)
def test_gradients(shape, mask, softcap):
    q, k, v = flash.drawn(1, *shape)
    wanted = flash.exact_gradients(
        q, k, v, flash.visible(*shape[:3], **mask), shape[-1] ** -0.5, softcap
    )
    pairs = {n: tuple(map(jnp.asarray, x)) for n, x in mask.items() if isinstance(x, tuple)}
    got = flash.gradients("pallas", q, k, v, mask | pairs, softcap, blocks=None)
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6 * np.abs(theirs).max())


ALONE = (np.array([[1] * 40 + [7] * 24]), np.array([[1] * 64]))


def test_a_query_without_any_key_is_zero():
    flash.compare((1, 64, 64, 2, 1, 32), blocks=None, causal=False, segments=ALONE)


@pytest.mark.slow
def test_a_query_without_any_key_has_no_gradient():
    q, k, v = flash.drawn(1, 1, 64, 64, 2, 1, 16)
    mask = {"causal": False, "segments": tuple(map(jnp.asarray, ALONE))}
    got = flash.gradients("pallas", q, k, v, mask, blocks=None)
    assert not np.asarray(got[0][:, 40:]).any() and all(np.isfinite(x).all() for x in got)


@pytest.mark.slow
def test_sinks_and_masks_of_blocks_and_their_gradients():
    q, k, v = flash.drawn(5, 1, 256, 256, 2, 1, 16)
    seen = np.array([[[True, False], [True, True]]])
    sinks = jnp.asarray([0.5, -1.0], jnp.float32)

    def results(implementation):
        def function(q, k, v, sinks):
            return flash_attention(
                q,
                k,
                v,
                scale=0.2,
                causal=True,
                sinks=sinks,
                block_mask=seen,
                blocks=Blocks(128, 128, 128, 128),
                implementation=implementation,
                interpret=implementation == "pallas" and "gpu",
            )

        (out, log), back = jax.vjp(function, q, k, v, sinks)
        return out, log, *back((jnp.cos(out), jnp.sin(log)))

    for ours, theirs in zip(results("pallas"), results("xla"), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1.0, float(jnp.abs(theirs).max())))


@settings(max_examples=200)
@given(
    first=st.integers(-100, 300),
    size=st.sampled_from([8, 16]),
    step=st.sampled_from([4, 32]),
    length=st.integers(1, 200),
    causal=st.booleans(),
    window=st.sampled_from([0, 1, 7, 40]),
)
def test_spans_hold_what_is_seen_and_inner_tiles_nothing_else(first, size, step, length, causal, window):
    reach = reach_of(causal, window)
    for least, most in (reach, (-reach[1], -reach[0])):  # of keys that queries see, and turned around
        begin, inner, inner_end, end = map(int, flash_gpu.span(first, size, step, length, (least, most)))
        apart = first + np.arange(size)[:, None] - np.arange(length)
        seen = (apart >= max(least, -FAR)) & (apart <= most)
        tiles = np.flatnonzero(seen.any(axis=0)) // step
        assert 0 <= begin <= inner <= inner_end <= end <= -(-length // step)
        assert not len(tiles) or (begin <= tiles.min() and tiles.max() < end)
        assert inner == inner_end or inner_end * step <= length
        assert seen[:, inner * step : inner_end * step].all()


@pytest.mark.parametrize(
    ("mix", "options"),
    [
        ("single tokens", {}),
        ("single tokens", {"dtype": jnp.int8, "page": 64, "window": 20}),
        pytest.param("single tokens", {"dtype": jnp.float8_e5m2, "page": 16}, marks=SLOW),
        pytest.param("single tokens", {"dtype": jnp.float8_e4m3fn, "page": 256}, marks=SLOW),
        pytest.param("single tokens", {"heads": 6, "kv_heads": 3, "dim": 48}, marks=SLOW),
        pytest.param("chunks", {}, marks=SLOW),
        pytest.param("chunks", {"heads": 3, "kv_heads": 1, "dim": 128, "page": 8}, marks=SLOW),
        ("both", {"window": 20, "softcap": 2.0}),
        pytest.param("both", {"dtype": jnp.int8}, marks=SLOW),
        pytest.param("both", {"dtype": jnp.float8_e4m3fn, "page": 128}, marks=SLOW),
        pytest.param("both", {"heads": 16, "kv_heads": 1, "dim": 16, "room": 32}, marks=SLOW),
        pytest.param("both", {"q_dtype": jnp.bfloat16, "dtype": jnp.bfloat16, "atol": 0.01}, marks=SLOW),
    ],
    ids=str,
)
def test_attention_to_pages(mix, options):
    paged.compare(*paged.MIXES[mix], **options)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_mix_of_rows(data):
    singles = data.draw(st.integers(0, 4))
    chunks = data.draw(st.lists(st.integers(2, 60), min_size=0 if singles else 1, max_size=3))
    counts = [1] * singles + chunks
    past = [data.draw(st.integers(0, 100)) for _ in counts]
    page, window = data.draw(st.sampled_from([8, 16, 64])), data.draw(st.sampled_from([0, 1, 30]))
    room = data.draw(st.sampled_from([0, 16]))
    paged.compare(counts, past, heads=2, kv_heads=1, dim=16, page=page, window=window, room=room)


def test_pages_beyond_a_row_may_hold_anything():
    rows, count, pool = paged.batch((1, 20), (7, 3), 16)
    q, k, v, pages = paged.drawn(rows, count, pool, 2, 1, 16, 16, jnp.float32)
    rows = jax.tree.map(jnp.asarray, rows)
    run = jax.jit(
        functools.partial(paged.paged_attention, implementation="pallas", interpret=True, scale=1.0)
    )
    wanted, _ = run(q, k, v, pages, rows, 0)
    spoilt = np.full_like(pages.tokens, np.nan)
    for row, length in enumerate(np.asarray(rows.lengths - rows.counts)):
        for place in range(length):
            at = (0, int(rows.table[row, place // 16]), slice(None), place % 16)
            spoilt[at] = pages.tokens[at]
    got, _ = run(q, k, v, type(pages)(jnp.asarray(spoilt), None), rows, 0)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.slow
def test_rows_that_are_not_there_change_nothing():
    rows, _, pool = paged.batch((1, 1, 1), (40, 0, 95), 16)
    q, k, v, pages = paged.drawn(rows, 3, pool, 4, 2, 32, 16, jnp.float32)
    rows = jax.tree.map(jnp.asarray, rows)
    none = Rows(**{**vars(rows), "decodes": jnp.int32(0), "rows": jnp.int32(0)})
    out, kept = paged.paged_attention(
        q, k, v, pages, none, 0, scale=1.0, implementation="pallas", interpret=True
    )
    assert np.all(np.asarray(out) == 0)
    np.testing.assert_array_equal(kept.tokens, pages.tokens)


@pytest.mark.parametrize("ring", [False, True])
def test_pages_in_order(ring):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((3, n, 16)), jnp.float32) for n in (4, 2, 2))
    pages = init_pages(2, 9, 16, 2, 16, dtype=jnp.float32)
    pages = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), pages)
    lengths, window = np.array([5, 47, 130 if ring else 20], np.int32), 0 if ring else 9
    out, held = jax.jit(
        functools.partial(
            paged_api.contiguous_attention, scale=0.3, ring=ring, window=window, interpret="gpu"
        )
    )(q, k, v, pages, 1, jnp.asarray(lengths))
    # A full ring is as pages of a row whose newest token comes where its oldest was.
    tokens = np.array(pages.tokens).reshape(2, 3, 3, 2, 16, 2, 16).swapaxes(2, 3)
    tokens = tokens.reshape(2, 3, 2, 48, 2, 16)
    for row, length in enumerate(lengths):
        tokens[1, row, :, length % 48] = np.stack([k[row], v[row]])
        end = min(length + 1, 48)
        seen = tokens[1, row, :, max(end - window, 0) if window else 0 : end]
        scores = np.einsum("kgh,skh->kgs", np.reshape(q[row], (2, 2, 16)), seen[0]) * 0.3
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        wanted = np.einsum("kgs,skh->kgh", weights / weights.sum(-1, keepdims=True), seen[1])
        np.testing.assert_allclose(out[row], wanted.reshape(4, 16), atol=2e-6)
    tokens = tokens.reshape(2, 3, 2, 3, 16, 32).swapaxes(2, 3)
    np.testing.assert_array_equal(held.tokens, tokens.reshape(pages.tokens.shape))


@pytest.mark.parametrize("page", [16, 64, 128, 384])
@pytest.mark.parametrize("kv_heads", [1, 3, 8])
def test_scales_are_found_where_they_are(page, kv_heads):
    half, head, slot = np.meshgrid(range(2), range(kv_heads), range(page), indexing="ij")
    place = functools.partial(paged_gpu.scale_place, kv_heads=kv_heads, page=page)
    found = place(*(jnp.asarray(x, jnp.int32) for x in (half, head, slot)))
    for ours, theirs in zip(found, scale_places(kv_heads, page), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_tiles_divide_what_ids_and_block_masks_come_in():
    for rule in GPUS.values():
        for dim, itemsize in ((64, 2), (128, 2), (256, 2), (128, 4), (256, 4)):
            for tile in TILE_RULE(rule, dim, itemsize):
                assert 128 % tile.block_q == 0 and 128 % tile.block_k == 0


def test_the_choice_has_a_reason():
    q = jax.ShapeDtypeStruct((1, 512, 4, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 2, 512, 64), jnp.bfloat16)
    for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA L4"):
        choice = choose(q, k, kind)
        assert (choice.implementation, choice.reason) == ("pallas", "GPU kernel")
    for kind in ("Tesla V100-SXM2-16GB", "Tesla T4"):
        assert "A100 or newer" in choose(q, k, kind).reason
    assert "no kernel for NVIDIA X1" in choose(q, k, "NVIDIA X1").reason
    assert gpu_rule("TPU v5e") is None and gpu_rule("cpu") is None
    assert "head_dim=512" in kernel_refusal("NVIDIA H200", 512)
    assert not kernel_refusal("TPU v5e", 512)


def test_a_jax_without_triton_does_without_gpu_kernels():
    """A later release: the package still imports, and says why XLA computes attention."""
    code = """
import sys
sys.modules["jax.experimental.pallas.triton"] = None
import llm_jax
from llm_jax.kernels.choice import kernel_refusal
print(kernel_refusal("NVIDIA H200", 128), "|", kernel_refusal("TPU v5e", 128))
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert "has no Pallas Triton, in which the GPU kernel is written | \n" in found.stdout


def test_pages_that_a_gpu_cannot_read_are_refused():
    rows = paged.batch((1,), (3,), 16)[0]
    q = jax.ShapeDtypeStruct((1, 4, 128), jnp.bfloat16)

    def reason(kind, pages, dtype):
        return paged_api.choose(q, abstract_pages(32, pages, 16, 2, 128, dtype), rows, kind)

    assert reason("NVIDIA H200", 100, jnp.float8_e4m3fn).implementation == "pallas"
    assert "cannot convert" in reason("NVIDIA A100", 100, jnp.float8_e4m3fn).reason
    assert reason("NVIDIA A100", 100, jnp.float8_e5m2).implementation == "pallas"
    assert "less than 2 GiB" in reason("NVIDIA H200", 10_000, jnp.int8).reason
    for pages, dtype in ((8_000, jnp.int8), (20_000, jnp.int8), (10_000, jnp.bfloat16)):
        assert reason("NVIDIA H200", pages, dtype).implementation == "pallas"


def test_a_fixed_batch_gets_a_cache_of_tiles(monkeypatch):
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 96, "max_positions": 64}
    model = ModelConfig("llama", 64, 2, 64, **sizes)
    refusal = functools.partial(kernel_refusal, "NVIDIA H200")
    monkeypatch.setattr(cache_choice, "kernel_refusal", lambda _, dim: refusal(dim))
    cache = cache_choice.abstract_cache(model.with_dtypes("gpu"), 2, 64, make_mesh(""))
    assert isinstance(cache, TiledCache)


@pytest.mark.slow
def test_models_attend_by_it_on_several_devices(monkeypatch):
    calls = []

    def interpreted(*args, **options):
        calls.append(args[0].shape)
        return flash_attention(*args, interpret="gpu", **options)

    def on_gpu():
        kind = functools.partial(attention.choose, kind="NVIDIA H200")
        monkeypatch.setattr(attention, "choose", kind)
        monkeypatch.setattr(attention, "flash_attention", interpreted)
        return calls

    in_models.test_attention_within_a_batch_and_its_gradient(on_gpu, "data:2,tensor:4")


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_on_a_gpu(dim):
    """Beside XLA's, with times: for whoever has one (`JAX_PLATFORMS=cuda pytest -m gpu -s`)."""
    q, k, v = flash.drawn(0, 1, 4096, 4096, 16, 4, dim, jnp.bfloat16)

    def gradients(implementation):
        def loss(q, k, v):
            how = {"scale": dim**-0.5, "causal": True, "implementation": implementation}
            out, log = flash_attention(q, k, v, **how)
            return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(log)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))

    ours, theirs = (jax.tree.leaves(gradients(x)(q, k, v)) for x in ("pallas", "xla"))
    for x, y in zip(ours, theirs, strict=True):
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        np.testing.assert_allclose(x, y, atol=2e-2 * max(1.0, np.abs(y).max()))
    print(f"\ndim={dim}: forward and backward {_seconds(gradients('pallas'), q, k, v) * 1e6:.0f} us")

    rows, count, pool = paged.batch([1] * 32, [4000] * 32, 16)
    q, k, v, pages = paged.drawn(rows, count, pool, 16, 4, dim, 16, jnp.bfloat16, 1, jnp.bfloat16)
    rows = jax.tree.map(jnp.asarray, rows)
    attention = functools.partial(paged_api.paged_attention, scale=dim**-0.5)
    ours, theirs = (
        jax.jit(functools.partial(attention, implementation=x))(q, k, v, pages, rows, 0)[0]
        for x in ("pallas", "xla")
    )
    np.testing.assert_allclose(paged.floats(ours), paged.floats(theirs), atol=2e-2)
    step = jax.jit(lambda *x: attention(*x, rows, 0, implementation="pallas"), donate_argnums=3)

    def decode(pages):
        return step(q, k, v, pages)[1]

    print(f"dim={dim}: decode step of a layer {_seconds(decode, pages, chained=True) * 1e6:.0f} us")


def _seconds(function, *args, repeats: int = 20, chained: bool = False) -> float:
    """Of one call, the best of three rounds; chained: a result is the next call's argument."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(repeats):
            out = function(*args)
            args = (out,) if chained else args
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - start) / repeats)
    return best
