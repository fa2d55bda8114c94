"""The TPU kernel of flash attention in interpret mode, and its plan, beside float64 in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.kernels.flash_attention.api import choose, flash_attention
from llm_jax.kernels.flash_attention.plan import fetched, plan_by_ids, plan_by_index
from llm_jax.kernels.flash_attention.tpu import DIAGONAL, SKIP, WHOLE, Blocks, reach_of, tiles_of
from llm_jax.tpu.races import run_checked

pytestmark = pytest.mark.lenient  # jax's simulator promotes
SMALL = Blocks(256, 128, 128, 128)


def drawn(seed, batch, queries, keys, heads, kv_heads, dim, dtype=np.float32):
    """q, k, v from a normal distribution."""
    rng = np.random.default_rng(seed)
    shapes = ((batch, queries, heads, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim))
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def exact(q, k, v, mask, scale, softcap=0.0):
    """(attention [B, T, N, H], log of the sums [B, N, T]) in float64; mask [B, T, S]."""
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // k.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("btnh,bnsh->bnts", q, k) * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(mask[:, None], scores, -np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        peak = scores.max(-1, keepdims=True)
        weights = np.where(np.isfinite(peak), np.exp(scores - peak), 0.0)
        total = weights.sum(-1, keepdims=True)
        out = np.einsum("bnts,bnsh->btnh", weights / np.where(total > 0, total, 1.0), v)
        return out, np.where(total > 0, peak + np.log(total), -np.inf)[..., 0]


def visible(batch, queries, keys, causal, window=0, offset=0, positions=None, segments=None):
    """The mask [B, T, S], pair by pair."""
    mask = np.zeros((batch, queries, keys), bool)
    for b in range(batch):
        at = positions[0][b] if positions else np.arange(queries) + offset
        key_at = positions[1][b] if positions else np.arange(keys)
        for t in range(queries):
            distance = at[t] - key_at
            seen = np.ones(keys, bool)
            if causal:
                seen &= distance >= 0
            if window:
                seen &= np.abs(distance) < window
            if segments:
                seen &= segments[1][b] == segments[0][b, t]
            mask[b, t] = seen
    return mask


def compare(
    shape, blocks=SMALL, dtype=np.float32, atol=5e-6, softcap=0.0, implementation="pallas", **mask
):
    """The kernel beside `exact` for (batch, queries, keys, heads, kv heads, dim)."""
    batch, queries, keys, _, _, dim = shape
    q, k, v = drawn(0, *shape, dtype=dtype)
    scale = dim**-0.5
    pairs = {n: tuple(map(jnp.asarray, mask[n])) for n in ("positions", "segments") if mask.get(n)}
    options = {n: x for n, x in mask.items() if n not in ("positions", "segments")} | pairs
    got, log = flash_attention(
        q,
        k,
        v,
        scale=scale,
        softcap=softcap,
        blocks=blocks,
        implementation=implementation,
        interpret=implementation == "pallas",
        **options,
    )
    wanted, wanted_log = exact(q, k, v, visible(batch, queries, keys, **mask), scale, softcap)
    assert got.dtype == q.dtype
    np.testing.assert_allclose(np.asarray(got.astype(jnp.float32)), wanted, atol=atol)
    seen = np.isfinite(wanted_log)
    np.testing.assert_allclose(np.asarray(log)[seen], wanted_log[seen], atol=4 * atol)
    assert np.all(np.asarray(log)[~seen] < -1e29)


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 512, 512, 4, 2, 64),
        (2, 256, 256, 2, 2, 128),
        pytest.param((1, 384, 384, 8, 1, 16), marks=pytest.mark.slow),
        (1, 300, 300, 3, 3, 80),
        pytest.param((1, 256, 256, 2, 1, 256), marks=pytest.mark.slow),
        (1, 40, 40, 2, 1, 96),
    ],
    ids=str,
)
def test_causal_attention_of_many_heads(shape, implementation):
    compare(shape, causal=True, implementation=implementation)


@pytest.mark.parametrize(
    "mask",
    [
        {"causal": False},
        {"causal": True, "window": 100},
        {"causal": False, "window": 100},
        {"causal": True, "softcap": 3.0},
    ],
    ids=str,
)
def test_other_masks(mask):
    compare((1, 400, 400, 4, 2, 32), **mask)


@pytest.mark.parametrize(
    ("queries", "keys", "offset"),
    [(256, 512, 256), pytest.param(128, 500, 372, marks=pytest.mark.slow), (100, 333, 50)],
)
def test_queries_at_the_end_of_their_keys(queries, keys, offset):
    compare((1, queries, keys, 4, 2, 32), causal=True, offset=offset)


def test_packed_documents():
    rng = np.random.default_rng(3)
    segments = np.sort(rng.integers(1, 6, (2, 512)), axis=1).astype(np.int32)
    starts = np.array([[np.flatnonzero(row == s)[0] for s in row] for row in segments])
    positions = (np.arange(512) - starts).astype(np.int32)
    mask = {"positions": (positions, positions), "segments": (segments, segments)}
    compare((2, 512, 512, 2, 1, 32), causal=True, **mask)
    compare((2, 512, 512, 2, 1, 32), causal=True, window=20, **mask)


def test_a_query_without_any_key_is_zero():
    segments = (np.array([[1] * 100 + [7] * 156]), np.array([[1] * 256]))
    compare((1, 256, 256, 2, 1, 32), causal=False, segments=segments)


def test_bfloat16_differs_by_its_own_roundings():
    compare((1, 512, 512, 4, 2, 128), causal=True, dtype=jnp.bfloat16, atol=2e-2)


def test_sums_by_vector_units(monkeypatch):
    from llm_jax.kernels.flash_attention import api

    rule = api.chip_rule(interpret=True)
    monkeypatch.setattr(api, "chip_rule", lambda _: type(rule)("v5e", rule.vmem_bytes, False))
    compare((1, 512, 512, 4, 2, 64), causal=True)


@st.composite
def ragged(draw):
    """Any shapes, documents and masks."""
    batch, kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries, keys = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    dim = draw(st.sampled_from([16, 32, 64]))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    mask = {"causal": draw(st.booleans()), "window": draw(st.sampled_from([0, 1, 17, 200]))}
    if draw(st.booleans()):
        pair = tuple(
            np.sort(rng.integers(0, 4, (batch, n)), axis=1).astype(np.int32) for n in (queries, keys)
        )
        mask["segments"] = pair
    if draw(st.booleans()):
        pair = tuple(rng.integers(0, 300, (batch, n)).astype(np.int32) for n in (queries, keys))
        mask["positions"] = pair
    else:
        mask["offset"] = draw(st.integers(0, 50))
    return (batch, queries, keys, kv_heads * groups, kv_heads, dim), mask


@pytest.mark.slow
@settings(max_examples=25)
@given(ragged())
def test_any_shapes_and_masks(drawn_case):
    shape, mask = drawn_case
    compare(shape, blocks=Blocks(128, 128, 128, 128), **mask)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    causal=st.booleans(),
    window=st.sampled_from([0, 5, 40, 100]),
    documents=st.integers(1, 6),
    shuffled=st.booleans(),
)
def test_blocks_are_never_called_hidden_or_whole_wrongly(seed, causal, window, documents, shuffled):
    rng, size, blocks = np.random.default_rng(seed), 96, Blocks(16, 8, 8, 8)
    segments = np.sort(rng.integers(0, documents, (2, size)), axis=1)
    positions = rng.integers(0, 200, (2, size)) if shuffled else np.tile(np.arange(size), (2, 1))
    of_queries = jnp.asarray(np.stack([positions, segments], 1), jnp.int32)
    of_keys = jnp.asarray(np.stack([positions, segments], 2), jnp.int32)
    kinds, _ = plan_by_ids(of_queries, of_keys, causal, window, blocks)
    mask = visible(2, size, size, causal, window, 0, (positions, positions), (segments, segments))
    tiles = mask.reshape(2, 6, 16, 12, 8)
    kinds, fetch = np.asarray(kinds), np.asarray(fetched(jnp.asarray(kinds)))
    assert not tiles.any(axis=(2, 4))[kinds == SKIP].any()
    assert tiles.all(axis=(2, 4))[kinds == WHOLE].all()
    if not shuffled and documents == 1:  # then every block is judged exactly
        assert tiles.any(axis=(2, 4))[kinds != SKIP].all()
    own = np.broadcast_to(np.arange(12), fetch.shape)
    np.testing.assert_array_equal(fetch[kinds != SKIP], own[kinds != SKIP])
    changes = (np.diff(fetch, axis=-1) != 0).sum() + fetch[..., 0].size
    assert changes <= max((kinds != SKIP).sum(), 0) + (kinds != SKIP).any(-1).size, (
        "nothing is fetched twice"
    )


def test_a_plan_by_index_is_the_triangle():
    kinds, used = plan_by_index(32, 48, 16, reach_of(True, 0), Blocks(16, 8, 8, 8))
    assert kinds[0].tolist() == [
        [WHOLE, WHOLE, DIAGONAL, DIAGONAL + 1, SKIP, SKIP],
        [WHOLE, WHOLE, WHOLE, WHOLE, DIAGONAL, DIAGONAL + 1],
    ]
    assert fetched(jnp.asarray(kinds))[0].tolist() == [[0, 1, 2, 3, 3, 3], [0, 1, 2, 3, 4, 5]]
    assert used == {SKIP, WHOLE, DIAGONAL, DIAGONAL + 1}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 5, 8, 24, 100])
def test_tiles_of_masks_that_are_known_compute_what_is_seen(causal, window):
    size, blocks, reach = 64, Blocks(32, 16, 8, 8), reach_of(causal, window)
    kinds, used = plan_by_index(size, size, 0, reach, blocks)
    seen = visible(1, size, size, causal, window)[0]
    computed, plain = np.zeros_like(seen), np.zeros_like(seen)
    for (_, i, j), kind in np.ndenumerate(kinds):
        assert kind in used
        for _, first_q, size_q, first_k, size_k, crossed in tiles_of(1, blocks, int(kind), reach):
            rows = slice(i * 32 + first_q, i * 32 + first_q + size_q)
            part = (rows, slice(j * 16 + first_k, j * 16 + first_k + size_k))
            if kind != SKIP:
                assert not computed[part].any(), "nothing is computed twice"
                computed[part] = True
                plain[part] = not crossed
    assert computed[seen].all() and seen[plain].all()
    tiles = seen.reshape(8, 8, 8, 8).any(axis=(1, 3))
    assert computed.sum() == 64 * tiles.sum(), "no tile is computed for nothing"


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_the_kernel_has_no_races(causal):
    q, k, v = drawn(0, 1, 256, 256, 2, 1, 32)
    options = {"scale": 0.2, "causal": causal, "blocks": Blocks(128, 128, 128, 128)}

    def function(q, k, v):
        return flash_attention(q, k, v, implementation="pallas", interpret=True, **options)

    got, _ = run_checked(function, q, k, v)
    wanted, _ = exact(q, k, v, visible(1, 256, 256, causal), 0.2)
    np.testing.assert_allclose(got, wanted, atol=5e-6)


def test_the_choice_has_a_reason():
    q = jax.ShapeDtypeStruct((1, 512, 4, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 2, 512, 64), jnp.bfloat16)
    assert choose(q, k, "TPU v5e").implementation == "pallas"
    assert "no kernel for cpu" in choose(q, k, "cpu").reason
    odd = jax.ShapeDtypeStruct((1, 512, 4, 72), jnp.bfloat16)
    assert "head_dim=72" in choose(odd, odd, "TPU v4").reason
    short = jax.ShapeDtypeStruct((1, 8, 4, 64), jnp.bfloat16)
    assert "8 queries" in choose(short, k, "TPU v4").reason
    half = jax.ShapeDtypeStruct((1, 512, 4, 64), jnp.float16)
    assert "float16" in choose(half, k, "TPU v4").reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "cudnn"}, "implementation='cudnn': expected one of"),
        ({"implementation": "pallas"}, "implementation='pallas': there is no kernel for cpu"),
        ({name: np.zeros((1, 3, 16, 8), np.float32) for name in "kv"}, "does not fit"),
        ({"v": np.zeros((1, 2, 15, 8), np.float32)}, r"expected \[B, T, N, H\]"),
        ({"k": np.zeros((1, 2, 16, 8), np.float16)}, "expected one dtype"),
        (
            {"segments": (np.zeros((1, 16)), np.zeros((1, 15)))},
            r"segments of .*expected \(\(1, 16\), \(1, 16\)\)",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    q = np.zeros((1, 16, 4, 8), np.float32)
    given_arrays = {
        "q": q,
        "k": np.zeros((1, 2, 16, 8), np.float32),
        "v": np.zeros((1, 2, 16, 8), np.float32),
    }
    with pytest.raises(ValueError, match=message):
        flash_attention(**given_arrays | change, scale=1.0, causal=True)


def gradients(implementation, q, k, v, mask, softcap=0.0, blocks=SMALL):
    """Of a random function of both results, by q, k and v."""
    rng = np.random.default_rng(9)
    weights = jnp.asarray(rng.standard_normal(q.shape), jnp.float32)
    log_weights = jnp.asarray(rng.standard_normal((q.shape[0], q.shape[2], q.shape[1])), jnp.float32)

    def loss(q, k, v):
        out, log = flash_attention(
            q,
            k,
            v,
            scale=q.shape[-1] ** -0.5,
            softcap=softcap,
            blocks=blocks,
            implementation=implementation,
            interpret=implementation == "pallas",
            **mask,
        )
        seen = jnp.where(log > -1e20, log, 0.0)
        return jnp.sum(out.astype(jnp.float32) * weights) + jnp.sum(seen * log_weights)

    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)


def exact_gradients(q, k, v, mask, scale, softcap=0.0):
    """The same in float64, by the formulas of the softmax: mask [B, T, S]; dense, head by head."""
    rng = np.random.default_rng(9)
    weights = rng.standard_normal(q.shape).astype(np.float32)
    log_weights = rng.standard_normal((q.shape[0], q.shape[2], q.shape[1])).astype(np.float32)
    groups = q.shape[2] // k.shape[1]
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    grads = [np.zeros_like(x) for x in (q, k, v)]
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        at = (b, n // groups)
        raw = q[b, :, n] @ k[at].T * scale
        scores = softcap * np.tanh(raw / softcap) if softcap else raw
        shown = np.where(mask[b], scores, -1e300)
        p = np.where(mask[b], np.exp(shown - shown.max(1, keepdims=True)), 0.0)
        p /= np.maximum(p.sum(1, keepdims=True), 1e-300)
        do = weights[b, :, n].astype(np.float64)
        dp = do @ v[at].T
        ds = p * (dp - (p * dp).sum(1, keepdims=True) + log_weights[b, n][:, None])
        if softcap:
            ds *= 1 - (scores / softcap) ** 2
        grads[0][b, :, n] = ds @ k[at] * scale
        grads[1][at] += ds.T @ q[b, :, n] * scale
        grads[2][at] += p.T @ do
    return grads


@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("shape", "mask", "softcap"),
    [
        ((1, 256, 256, 4, 2, 64), {"causal": True}, 0.0),
        pytest.param((1, 200, 200, 8, 1, 32), {"causal": True}, 0.0, marks=pytest.mark.slow),
        pytest.param(
            (1, 128, 300, 2, 2, 32), {"causal": True, "offset": 172}, 0.0, marks=pytest.mark.slow
        ),
        pytest.param(
            (1, 384, 384, 2, 1, 32), {"causal": True, "window": 70}, 4.0, marks=pytest.mark.slow
        ),
        ((2, 256, 256, 2, 2, 16), {"causal": False, "segments": "sorted"}, 0.0),
    ],
    ids=str,
)
def test_gradients(shape, mask, softcap, fused, monkeypatch):
    from llm_jax.kernels.flash_attention import tpu_backward

    monkeypatch.setattr(tpu_backward, "KEPT_SHARE", tpu_backward.KEPT_SHARE if fused else 0.0)
    batch, queries, keys, _, _, dim = shape
    q, k, v = drawn(1, *shape)
    if "segments" in mask:
        rows = np.sort(np.random.default_rng(2).integers(0, 3, (batch, queries)), axis=1).astype(
            np.int32
        )
        mask = mask | {"segments": (jnp.asarray(rows), jnp.asarray(rows))}
    got = gradients("pallas", q, k, v, mask, softcap)
    dense = visible(batch, queries, keys, **mask)
    wanted = exact_gradients(q, k, v, dense, dim**-0.5, softcap)
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def test_gradients_of_xla_agree():
    shape, mask = (1, 100, 100, 4, 2, 32), {"causal": True}
    q, k, v = drawn(1, *shape)
    wanted = exact_gradients(q, k, v, visible(1, 100, 100, True), 32**-0.5)
    for ours, theirs in zip(gradients("xla", q, k, v, mask), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_a_query_without_any_key_has_no_gradient(implementation):
    segments = (jnp.asarray([[1] * 60 + [7] * 68]), jnp.asarray([[1] * 128]))
    mask = {"causal": False, "segments": segments}
    q, k, v = drawn(1, 1, 128, 128, 2, 1, 16)
    got = gradients(implementation, q, k, v, mask, blocks=Blocks(128, 128, 128, 128))
    assert not np.asarray(got[0][:, 60:]).any()
    wanted = exact_gradients(q, k, v, visible(1, 128, 128, **mask), 0.25)
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("implementation", [pytest.param("pallas", marks=pytest.mark.slow), "xla"])
def test_sinks_and_masks_of_blocks_and_their_gradients(implementation):
    batch, length, heads, dim = 2, 512, 2, 32
    q, k, v = drawn(5, batch, length, length, heads, 1, dim)
    blocks = Blocks(256, 128, 128, 128)
    sinks = jnp.asarray([0.5, -1.0], jnp.float32)
    seen = np.random.default_rng(1).random((batch, 2, 4)) < 0.6
    seen[:, 1, 0] = False
    mask = visible(batch, length, length, True) & np.repeat(np.repeat(seen, 256, 1), 128, 2)

    def ours(q, k, v, sinks):
        how = {"implementation": implementation, "interpret": implementation == "pallas"}
        return flash_attention(
            q, k, v, scale=0.2, causal=True, sinks=sinks, block_mask=seen, blocks=blocks, **how
        )

    def plain(q, k, v, sinks):
        scores = jnp.einsum("btnh,bsh->bnts", q, k[:, 0]) * 0.2
        scores = jnp.where(mask[:, None], scores, -1e30)
        more = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, more], axis=-1), axis=-1)[..., :-1]
        log = jax.nn.logsumexp(jnp.concatenate([scores, more], axis=-1), axis=-1)
        return jnp.einsum("bnts,bsh->btnh", weights, v[:, 0]), log

    with jax.default_matmul_precision("highest"):
        (out, log), back = jax.vjp(ours, q, k, v, sinks)
        (wanted, wanted_log), wanted_back = jax.vjp(plain, q, k, v, sinks)
    np.testing.assert_allclose(out, wanted, atol=5e-6)
    np.testing.assert_allclose(log, wanted_log, atol=2e-5)
    for got, want in zip(back((out, log)), wanted_back((out, log)), strict=True):
        np.testing.assert_allclose(got, want, atol=5e-5 * float(jnp.abs(want).max()))


def test_sinks_and_masks_of_blocks_that_do_not_fit():
    q, k, v = drawn(0, 1, 512, 512, 2, 1, 32)
    call = functools.partial(flash_attention, q, k, v, scale=1.0, causal=True, implementation="xla")
    mask, blocks = np.ones((1, 2, 4), bool), Blocks(256, 128, 128, 128)
    with pytest.raises(ValueError, match="sinks \\(3,\\)"):
        call(sinks=jnp.zeros(3))
    with pytest.raises(ValueError, match="block_mask without blocks"):
        call(block_mask=mask)
    with pytest.raises(ValueError, match="they must divide 512 queries"):
        call(block_mask=mask, blocks=Blocks(384, 128, 128, 128))
    with pytest.raises(ValueError, match="expected \\[1 or 1, 2, 4\\]"):
        call(block_mask=mask[:, :1], blocks=blocks)
    with pytest.raises(ValueError, match="expected bool"):
        call(block_mask=mask.astype(np.int32), blocks=blocks)
