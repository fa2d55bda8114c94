"""Flash attention for TPUs, backward: one kernel, or two where a key head's queries do not fit VMEM.

Both ways compute the weights again, p = exp(s - log), and ds = p (dp - delta) with dp = v do^T and
delta = the sum of do times the output (Dao et al. 2022), in tiles of [keys, queries] as forward does;
letters and kinds of blocks are those of `tpu`. The one kernel goes through the queries for every block
of keys and keeps the gradients of all queries in VMEM meanwhile; the two compute s and dp twice.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm_jax.kernels.flash_attention.tpu import (
    HIDDEN,
    MASKED,
    SKIP,
    Blocks,
    Reach,
    ahead_of,
    heads_at_once,
    hide_outside,
    product,
    reach_of,
    tiles_of,
    visible,
)

KEPT_SHARE = 1 / 3  # of VMEM, which the gradients of all queries of a key head may take


def flash_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out_grad: jax.Array,
    log: jax.Array,
    delta: jax.Array,
    kinds: jax.Array,
    fetch_keys: jax.Array,
    fetch_queries: jax.Array,
    ids: tuple[jax.Array, ...] = (),
    *,
    heads: int,
    blocks: Blocks,
    used: frozenset[int],
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    vmem_limit: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v in their shapes and dtypes.

    q and out_grad [B, T, N H] or [B, N / G, G, T, H]; k, v [B, K, S, H]; log, delta [B, N / G, G, T]
    float32, log a very large number where a query sees nothing. kinds, fetch_keys [B or 1, T / block_q,
    S / block_k] int32; fetch_queries [B or 1, S / block_k, T / block_q]: which block of queries should
    have been fetched. The others: see `tpu.flash_forward`.
    """
    batch, kv_heads, keys, dim = k.shape
    groups = heads_at_once(heads // kv_heads)
    shares = heads // groups // kv_heads  # parts of a key head's queries
    flat, queries = q.ndim == 3, q.shape[1 if q.ndim == 3 else 3]
    bq, bk = blocks.block_q, blocks.block_k
    many = kinds.shape[0] > 1
    reach = reach_of(causal, window)
    tiles = [tile for kind in used - {SKIP} or {SKIP} for tile in tiles_of(1, blocks, kind, reach)]
    tile_q = max(size for _, _, size, _, _, _ in tiles)
    options = {
        "blocks": blocks,
        "used": used,
        "scale": scale,
        "softcap": softcap,
        "seen": functools.partial(visible, causal=causal, window=window),
        "reach": reach,
        "many": many,
    }

    def settings(semantics):
        limits = {"vmem_limit_bytes": vmem_limit, "disable_bounds_checks": True}
        params = pltpu.CompilerParams(dimension_semantics=semantics, **limits)
        return {"compiler_params": params, "interpret": interpret}

    tile = pltpu.VMEM((2, blocks.tile_k, tile_q), jnp.float32)

    def specs(order):
        """Of the inputs; order(b, x, y, fetch) -> (block of queries, block of keys)."""

        def at_queries(b, h, x, y, kinds, fetch):
            return (b, order(b, x, y, fetch)[0], h) if flat else (b, h, 0, order(b, x, y, fetch)[0], 0)

        def at_keys(b, h, x, y, kinds, fetch):
            return b, h // shares, order(b, x, y, fetch)[1], 0

        wide = pl.BlockSpec((1, bq, groups * dim) if flat else (1, 1, groups, bq, dim), at_queries)
        row = pl.BlockSpec((1, 1, groups, bq), lambda b, h, x, y, _, f: (b, h, 0, order(b, x, y, f)[0]))
        narrow = pl.BlockSpec((1, 1, bk, dim), at_keys)
        given = [wide, narrow, narrow, wide, row, row]
        if ids:
            given += [
                pl.BlockSpec((1, 2, bq), lambda b, h, x, y, _, f: (b, 0, order(b, x, y, f)[0])),
                pl.BlockSpec((1, bk, 2), lambda b, h, x, y, _, f: (b, order(b, x, y, f)[1], 0)),
            ]
        return given

    def keys_outside(b, j, i, fetch):
        return fetch[b if many else 0, j, i], j

    def queries_outside(b, i, j, fetch):
        return i, fetch[b if many else 0, i, j]

    arrays = (q, k, v, out_grad, log, delta)
    k_rows = k.transpose(0, 1, 3, 2)
    last = keys // bk - 1
    of_keys = specs(keys_outside)
    # Parts of a key head's queries give parts of its gradient, which are added in float32.
    of_parts = jax.ShapeDtypeStruct(
        (batch, heads // groups, keys, dim), k.dtype if shares == 1 else jnp.float32
    )
    wide = of_keys[0].block_shape
    fused = queries * groups * dim * 4 <= KEPT_SHARE * vmem_limit
    # Of a fused kernel: the blocks of the queries' gradient are complete in the last round.
    whole = pl.BlockSpec(
        wide,
        (lambda b, h, j, i, *_: (b, jnp.where(j == last, i, 0), h))
        if flat
        else (lambda b, h, j, i, *_: (b, h, 0, jnp.where(j == last, i, 0), 0)),
    )
    results = pl.pallas_call(
        functools.partial(_keys_kernel, fused=fused, **options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads // groups, keys // bk, queries // bq),
            in_specs=[
                pl.BlockSpec((1, 1, dim, bk), lambda b, h, j, *_: (b, h // shares, 0, j)),
                *of_keys,
            ],
            out_specs=[pl.BlockSpec((1, 1, bk, dim), lambda b, h, j, *_: (b, h, j, 0))] * 2
            + [whole] * fused,
            scratch_shapes=[pltpu.VMEM((bk, dim), jnp.float32)] * 2
            + [tile] * 2
            + [pltpu.VMEM((groups, dim, queries), jnp.float32)] * fused,
        ),
        out_shape=[of_parts] * 2 + [jax.ShapeDtypeStruct(q.shape, q.dtype)] * fused,
        name="flash_attention_keys",
        **settings(("parallel", "parallel", "arbitrary", "arbitrary")),
    )(kinds, fetch_queries, k_rows, *arrays, *ids)
    k_grad, v_grad = (
        x if shares == 1 else x.reshape(batch, kv_heads, shares, keys, dim).sum(axis=2).astype(k.dtype)
        for x in results[:2]
    )
    if fused:
        return results[2], k_grad, v_grad

    of_queries = specs(queries_outside)
    rows = pl.BlockSpec(
        (1, 1, dim, bk), lambda b, h, i, j, _, f: (b, h // shares, 0, f[b if many else 0, i, j])
    )
    (q_grad,) = pl.pallas_call(
        functools.partial(_queries_kernel, **options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads // groups, queries // bq, keys // bk),
            in_specs=[rows, *of_queries],
            out_specs=[of_queries[0]],
            scratch_shapes=[pltpu.VMEM((groups, dim, bq), jnp.float32), tile, tile],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        name="flash_attention_queries",
        **settings(("parallel", "parallel", "parallel", "arbitrary")),
    )(kinds, fetch_keys, k_rows, *arrays, *ids)
    return q_grad, k_grad, v_grad


class _Refs(NamedTuple):
    """The inputs of one step, and the scores and dp of two tiles, [2, tile_k, tile_q] each."""

    q: Any
    k: Any
    v: Any
    out_grad: Any
    log: Any
    delta: Any
    ids: tuple[Any, ...]
    scores: Any
    dp: Any


def _keys_kernel(
    kinds_ref, fetch_ref, k_rows, *rest, fused, blocks, used, scale, softcap, seen, reach, many
):
    """Gradients of one block of keys and values, from one block of queries of all their heads.

    fused: and those of all queries, which stay in VMEM until the last block of keys has been.
    """
    del fetch_ref
    ends = len(rest) - 6 - 2 * fused  # behind the inputs: 2 (or 3) outputs, 4 (or 5) buffers
    k_out, v_out, *q_out = rest[ends : ends + 2 + fused]
    k_sum, v_sum, scores, dp, *q_sum = rest[ends + 2 + fused :]
    refs = _Refs(*rest[:6], rest[6:ends], scores, dp)
    b, j, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    kind = kinds_ref[b if many else 0, i, j]
    start = pl.multiple_of(i * blocks.block_q, blocks.block_q)

    @pl.when(i == 0)
    def _():
        k_sum[...] = jnp.zeros_like(k_sum)
        v_sum[...] = jnp.zeros_like(v_sum)

    if fused:

        @pl.when(j == 0)
        def _():
            here = q_sum[0].at[:, :, pl.ds(start, blocks.block_q)]
            here[...] = jnp.zeros_like(here)

    def add(g, queries, keys, p, ds):
        out_grad, q = (_of_head(x, g, queries, refs) for x in (refs.out_grad, refs.q))
        p, ds = p.astype(q.dtype), ds.astype(q.dtype)
        v_sum[keys, :] += product(p, out_grad, 1, 0)
        k_sum[keys, :] += product(ds, q, 1, 0)
        if fused:
            lanes = pl.ds(start + queries.start, queries.size)
            q_sum[0][g, :, lanes] += product(k_rows[0, 0, :, keys], ds, 1, 0)

    for one in sorted(used - {SKIP}):
        pl.when(kind == one)(
            functools.partial(_step, refs, blocks, one, seen, reach, scale, softcap, add)
        )

    @pl.when(i == pl.num_programs(3) - 1)
    def _():
        k_out[0, 0] = (k_sum[...] * scale).astype(k_out.dtype)
        v_out[0, 0] = v_sum[...].astype(v_out.dtype)

    if fused:

        @pl.when(j == pl.num_programs(2) - 1)
        def _():
            _write_queries(q_out[0], q_sum[0].at[:, :, pl.ds(start, blocks.block_q)], scale)


def _write_queries(out, total, scale: float) -> None:
    """total [G, H, block_q] float32 into a block of the gradient of queries."""
    groups, dim, _ = total.shape
    for g in range(groups):
        grad = (total[g] * scale).T.astype(out.dtype)
        if len(out.shape) == 3:
            out[0, :, pl.ds(g * dim, dim)] = grad
        else:
            out[0, 0, g] = grad


def _queries_kernel(
    kinds_ref, fetch_ref, k_rows, *rest, blocks, used, scale, softcap, seen, reach, many
):
    """The gradient of one block of queries of all heads of a key head, from one block of keys."""
    del fetch_ref
    *inputs, q_out, q_sum, scores, dp = rest
    refs = _Refs(*inputs[:6], tuple(inputs[6:]), scores, dp)
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    kind = kinds_ref[b if many else 0, i, j]

    @pl.when(j == 0)
    def _():
        q_sum[...] = jnp.zeros_like(q_sum)

    def add(g, queries, keys, p, ds):
        del p
        rows = k_rows[0, 0, :, keys]
        q_sum[g, :, queries] += product(rows, ds.astype(rows.dtype), 1, 0)

    for one in sorted(used - {SKIP}):
        pl.when(kind == one)(
            functools.partial(_step, refs, blocks, one, seen, reach, scale, softcap, add)
        )

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        _write_queries(q_out, q_sum, scale)


def _step(refs: _Refs, blocks: Blocks, kind: int, seen, reach: Reach, scale: float, softcap: float, add):
    """add(head, queries, keys, p, ds) for each tile; s and dp of the next tile are made one ahead."""
    tiles = list(tiles_of(refs.log.shape[2], blocks, kind, reach))
    to_log2 = math.log2(math.e)

    def products(n):
        g, first_q, size_q, first_k, size_k, _ = tiles[n]
        queries, keys = pl.ds(first_q, size_q), pl.ds(first_k, size_k)
        part = (n % 2, slice(0, size_k), slice(0, size_q))
        k, v = refs.k[0, 0, keys, :], refs.v[0, 0, keys, :]
        refs.scores[part] = product(k, _of_head(refs.q, g, queries, refs), 1, 1)
        refs.dp[part] = product(v, _of_head(refs.out_grad, g, queries, refs), 1, 1)

    products(0)
    for n, (g, first_q, size_q, first_k, size_k, crossed) in enumerate(tiles):
        if n + 1 < len(tiles):
            products(n + 1)
        queries, keys = pl.ds(first_q, size_q), pl.ds(first_k, size_k)
        part = (n % 2, slice(0, size_k), slice(0, size_q))
        bent = jnp.tanh(refs.scores[part] * (scale / softcap)) if softcap else None
        scores = refs.scores[part] * (scale * to_log2) if bent is None else bent * (softcap * to_log2)
        if kind == MASKED:
            scores = jnp.where(seen(refs.ids, first_q, size_q, first_k, size_k), scores, HIDDEN)
        elif crossed:
            scores = hide_outside(scores, first_q - first_k - ahead_of(kind, blocks), reach)
        log, delta = (x[0, 0, pl.ds(g, 1), queries] for x in (refs.log, refs.delta))  # [1, size_q]
        p = jnp.exp2(scores - log * to_log2)
        ds = p * (refs.dp[part] - delta)
        add(g, queries, keys, p, ds if bent is None else ds * (1.0 - bent * bent))


def _of_head(ref, g: int, queries, refs: _Refs) -> jax.Array:
    """[queries, H] of head g of a block of q or of the output's gradient."""
    if len(ref.shape) == 5:
        return ref[0, 0, g, queries, :]
    dim = refs.k.shape[-1]
    return ref[0, queries, pl.ds(g * dim, dim)]
