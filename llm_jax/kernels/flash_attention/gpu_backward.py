"""Gradients of `gpu.flash_forward`, by two kernels: of keys and values, and of queries.

Letters as in `gpu`; G = N / K. Both compute the weights again from the logarithms that forward left.
A program of the first has a tile of keys of a key head and goes through the queries of its G query
heads, with scores transposed, [keys, queries], so that both its sums are products as they come; one of
the second has a tile of queries, as forward.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llm_jax.kernels.flash_attention.gpu import (
    LOG2_E,
    Spec,
    Visits,
    head_width,
    ids_of,
    load,
    over_parts,
    scores_of,
    span,
    store,
    visible,
    visit_specs,
)
from llm_jax.kernels.flash_attention.tpu import product


def flash_backward(
    arrays: tuple[jax.Array, ...],
    by_keys: Visits | None,
    by_queries: Visits | None,
    spec: Spec,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v, in their shapes and dtypes.

    arrays: q [B, T, N, H], k and v [B, K, S, H], the gradient of the output like q, and [B, N, T]
    float32 the logarithms, -HIDDEN where a query sees nothing, and the sums over H of output times its
    gradient, less the logarithms' gradient. by_keys: tiles of queries for each of keys, ids as ever.
    """
    q, k, *_ = arrays
    (batch, queries, heads, dim), (_, kv_heads, keys, _) = q.shape, k.shape
    width, groups = head_width(dim), heads // kv_heads
    sizes = {"dim": dim, "queries": queries, "keys": keys, "spec": spec}

    tile = spec.tiles.of_keys
    own = lambda j, k, b: j  # noqa: E731
    every_query = pl.BlockSpec((None, queries, groups, width), lambda j, k, b: (b, 0, k, 0))
    own_keys = pl.BlockSpec((None, None, tile.block_k, width), lambda j, k, b: (b, k, j, 0))
    row = pl.BlockSpec((None, groups, queries), lambda j, k, b: (b, k, 0))
    dk, dv = pl.pallas_call(
        functools.partial(_keys_kernel, **sizes),
        grid=(pl.cdiv(keys, tile.block_k), kv_heads, batch),
        in_specs=[
            every_query,
            own_keys,
            own_keys,
            every_query,
            row,
            row,
            *visit_specs(by_keys, None, tile.block_k, own),
        ],
        out_specs=[own_keys, own_keys],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=spec.interpret,
        name="flash_attention_keys",
    )(*arrays, *(by_keys or ()))

    tile = spec.tiles.of_queries
    count = pl.cdiv(queries, tile.block_q)
    own = lambda i, n, b: count - 1 - i  # noqa: E731
    own_queries = pl.BlockSpec(
        (None, tile.block_q, None, width), lambda *ids: (ids[2], own(*ids), ids[1], 0)
    )
    every_key = pl.BlockSpec((None, None, keys, width), lambda i, n, b: (b, n // groups, 0, 0))
    row = pl.BlockSpec((None, None, tile.block_q), lambda *ids: (ids[2], ids[1], own(*ids)))
    dq = pl.pallas_call(
        functools.partial(_queries_kernel, **sizes),
        grid=(count, heads, batch),
        in_specs=[
            own_queries,
            every_key,
            every_key,
            own_queries,
            row,
            row,
            *visit_specs(by_queries, tile.block_q, None, own),
        ],
        out_specs=own_queries,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=spec.interpret,
        name="flash_attention_queries",
    )(*arrays, *(by_queries or ()))
    return dq, dk, dv


def _keys_kernel(
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    log_ref,
    delta_ref,
    *rest,
    dim: int,
    queries: int,
    keys: int,
    spec: Spec,
):
    """One tile of keys of a key head; out_ref: the gradient of the output."""
    *given, dk_ref, dv_ref = rest
    visits, tile, groups = Visits(*given) if given else None, spec.tiles.of_keys, q_ref.shape[1]
    first, size = pl.program_id(0) * tile.block_k, tile.block_q
    place = first + jnp.arange(tile.block_k)
    k, v = (load(x, place < keys, dim) for x in (k_ref, v_ref))

    def of_tile(masked, i, carry, g):
        rows, at = i * size + jnp.arange(size), pl.ds(i * size, size)
        here = rows < queries if masked else None
        q, out = (load(x.at[at, g], here, dim) for x in (q_ref, out_ref))
        log, delta = (load(x.at[g, at], here) for x in (log_ref, delta_ref))
        seen = None
        if masked:
            query, key = ids_of(visits, rows, at, place, slice(None), spec)
            seen = visible([x[None] for x in query], [x[:, None] for x in key], spec.reach)
        weights, slope = _weights(product(k, q, 1, 1), log[None], seen, spec)
        dk, dv = carry
        dv += product(weights.astype(out.dtype), out, 1, 0)
        grads = slope * (product(v, out, 1, 1) - delta[None])
        return dk + product(grads.astype(q.dtype), q, 1, 0), dv

    zero = jnp.zeros(k.shape, jnp.float32)
    least, most = spec.reach
    bounds = span(first - spec.offset, tile.block_k, size, queries, (-most, -least))
    dk, dv = over_parts(of_tile, (zero, zero), bounds, visits, groups)
    store(dk_ref, (dk * spec.scale).astype(dk_ref.dtype), place < keys, dim)
    store(dv_ref, dv.astype(dv_ref.dtype), place < keys, dim)


def _queries_kernel(
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    log_ref,
    delta_ref,
    *rest,
    dim: int,
    queries: int,
    keys: int,
    spec: Spec,
):
    """One tile of queries of a head."""
    *given, dq_ref = rest
    visits, tile = Visits(*given) if given else None, spec.tiles.of_queries
    i = pl.num_programs(0) - 1 - pl.program_id(0)
    first, size = i * tile.block_q, tile.block_k
    rows = first + jnp.arange(tile.block_q)
    q, out = (load(x, rows < queries, dim) for x in (q_ref, out_ref))
    log, delta = (load(x, rows < queries) for x in (log_ref, delta_ref))

    def of_tile(masked, j, dq):
        place, at = j * size + jnp.arange(size), pl.ds(j * size, size)
        k, v = (load(x.at[at], place < keys if masked else None, dim) for x in (k_ref, v_ref))
        seen = None
        if masked:
            query, key = ids_of(visits, rows, slice(None), place, at, spec)
            seen = visible([x[:, None] for x in query], [x[None] for x in key], spec.reach)
            seen &= (place < keys)[None]
        _, slope = _weights(product(q, k, 1, 1), log[:, None], seen, spec)
        grads = slope * (product(out, v, 1, 1) - delta[:, None])
        return dq + product(grads.astype(k.dtype), k, 1, 0)

    bounds = span(first + spec.offset, tile.block_q, size, keys, spec.reach)
    dq = over_parts(of_tile, jnp.zeros(q.shape, jnp.float32), bounds, visits)
    store(dq_ref, (dq * spec.scale).astype(dq_ref.dtype), rows < queries, dim)


def _weights(products, log, seen, spec: Spec) -> tuple[jax.Array, jax.Array]:
    """(weights, weights times the slope of the soft cap) of products of queries and keys."""
    scores = scores_of(products, spec)
    weights = jnp.exp2(scores - log * LOG2_E)
    if seen is not None:
        weights = jnp.where(seen, weights, 0.0)
    if not spec.softcap:
        return weights, weights
    share = scores / (spec.softcap * LOG2_E)  # tanh again
    return weights, weights * (1.0 - share * share)
