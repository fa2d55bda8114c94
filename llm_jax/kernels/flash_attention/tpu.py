"""Flash attention for TPUs, forward (Dao et al. 2022, 2023), with keys on sublanes and queries on lanes.

Letters: B batch, K key/value heads, G query heads of each, T queries, S keys, H head dim; blocks of
`block_q` queries and `block_k` keys; tiles of `tile_k` keys times `tile_q` queries within them.

What makes it fast, by the count of the compiler's code:

* Scores are computed transposed, [keys, queries] = k q^T. The maximum over keys is then taken over
  whole registers and once over 8 sublanes at the end, and what belongs to a query (maximum, sum,
  rescaling) is one row that is broadcast over sublanes, which costs nothing. With queries on sublanes
  each of them needs shuffles across lanes, for every tile.
* The second product is v^T p, [H, queries]: p is the weight matrix of units of 256 x 256 and fills them,
  which p v, whose result is H = 128 wide, does to a half.
* Where the units are 256 wide, rows of ones below v^T make them sum p too: there the vector units have
  more to do than they, elsewhere less.
* The scores of the next tile are computed before the softmax of this one, by way of a buffer, so that
  matrix and vector units work at the same time. Left alone the compiler does one after the other.
* Blocks that a mask hides are neither fetched nor computed; those that it does not touch are not masked;
  of a causal diagonal only the tiles that it crosses are.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

HIDDEN = -1e30  # the score of a key that a query does not see
ONES = 32  # bytes of a column of ones: 16 rows of bfloat16, 8 of float32, a tile of registers each
LOWEST = -1e29  # where the maximum begins: above HIDDEN, so that a query without any key sums to 0
LANES = 128
HEADS_AT_ONCE = 4  # of one key head; in more than this the compiler takes minutes for little
SKIP, WHOLE, MASKED = range(3)  # kinds of blocks
DIAGONAL = 1 << 16  # + n: touched by a mask that is known, n blocks of keys ahead of its queries
FAR = 1 << 30  # further apart than any query and key
Reach = tuple[int, int]  # the least and the most places from a key to a query that sees it


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes in queries and keys: what is fetched, what is computed at a time, and that of diagonals."""

    block_q: int
    block_k: int
    tile_k: int
    diagonal_tile: int

    def fitted(self, queries: int, keys: int) -> "Blocks":
        """As large at most, for sequences of these lengths, with little padding at their ends.

        Where there are about as many keys as queries, a block of keys divides one of queries, so that a
        causal diagonal meets blocks at the same places everywhere.
        """
        block_q = even_part(queries, self.block_q)
        if keys <= 2 * queries:
            sizes = range(min(self.block_k, block_q) // LANES, 0, -1)
            block_k = LANES * next(n for n in sizes if block_q % (n * LANES) == 0)
        else:
            block_k = even_part(keys, self.block_k)
        tile_k = largest_tile(self.tile_k, block_k)
        return Blocks(
            block_q, block_k, tile_k, largest_tile(min(self.diagonal_tile, tile_k), tile_k, block_q)
        )


def even_part(length: int, most: int) -> int:
    """The size of the fewest parts of at most `most` that a sequence has, with the least padding."""
    parts = -(-length // most)
    unit = LANES if length <= 2 * LANES else 2 * LANES
    return min(-(-length // parts // unit) * unit, -(-most // LANES) * LANES)


def largest_tile(most: int, *blocks: int) -> int:
    """The largest multiple of 128 up to `most` that divides all of these."""
    return LANES * next(
        n for n in range(most // LANES, 0, -1) if all(x % (n * LANES) == 0 for x in blocks)
    )


def heads_at_once(groups: int) -> int:
    """How many of a key head's `groups` query heads one step of the grid takes."""
    return next(n for n in range(min(groups, HEADS_AT_ONCE), 0, -1) if groups % n == 0)


def flash_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kinds: jax.Array,
    fetch: jax.Array,
    ids: tuple[jax.Array, ...] = (),
    *,
    heads: int,
    blocks: Blocks,
    used: frozenset[int],
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    ones: bool,
    vmem_limit: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(output in the shape and dtype of q, log of the sums of exponentials [B, N / G, G, T] float32).

    G: heads of a step, `heads_at_once`. q [B, T, N H] with N = `heads`, or [B, N / G, G, T, H] where G H
    is no multiple of 128; k [B, K, S, H]; v [B, K, H, S]. kinds, fetch [B or 1, T / block_q, S /
    block_k] int32: what to do with a block, and which one to have fetched by then; used: the kinds that
    occur. ids, where MASKED is among them: positions and segments of queries [B, 2, T] and of keys
    [B, S, 2], int32; those of equal segments see each other, as far as causal and window say. ones:
    whether the matrix units sum the weights.
    """
    batch, kv_heads, dim, keys = v.shape
    groups = heads_at_once(heads // kv_heads)
    shares = heads // groups // kv_heads  # parts of a key head's queries, which read the same keys
    flat, queries = q.ndim == 3, q.shape[1 if q.ndim == 3 else 3]
    bq, bk = blocks.block_q, blocks.block_k
    many = kinds.shape[0] > 1

    def place(b, i, j, fetch):
        return fetch[b if many else 0, i, j]

    if flat:
        of_queries = pl.BlockSpec((1, bq, groups * dim), lambda b, h, i, *_: (b, i, h))
    else:
        of_queries = pl.BlockSpec((1, 1, groups, bq, dim), lambda b, h, i, *_: (b, h, 0, i, 0))
    in_specs = [
        of_queries,
        pl.BlockSpec(
            (1, 1, bk, dim), lambda b, h, i, j, _, fetch: (b, h // shares, place(b, i, j, fetch), 0)
        ),
        pl.BlockSpec(
            (1, 1, dim, bk), lambda b, h, i, j, _, fetch: (b, h // shares, 0, place(b, i, j, fetch))
        ),
    ]
    if ids:
        in_specs += [
            pl.BlockSpec((1, 2, bq), lambda b, h, i, *_: (b, 0, i)),
            pl.BlockSpec((1, bk, 2), lambda b, h, i, j, _, fetch: (b, place(b, i, j, fetch), 0)),
        ]
    kernel = functools.partial(
        _kernel,
        blocks=blocks,
        used=used,
        factor=scale / softcap if softcap else scale * math.log2(math.e),
        seen=functools.partial(visible, causal=causal, window=window),
        reach=reach_of(causal, window),
        softcap=softcap,
        ones=ONES // q.dtype.itemsize if ones else 0,
        many=many,
    )
    row = pltpu.VMEM((groups, 1, bq), jnp.float32)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads // groups, queries // bq, keys // bk),
            in_specs=in_specs,
            out_specs=[of_queries, pl.BlockSpec((1, 1, groups, bq), lambda b, h, i, *_: (b, h, 0, i))],
            scratch_shapes=[
                pltpu.VMEM((groups, bq, dim), q.dtype),
                pltpu.VMEM((groups, dim + (ONES // q.dtype.itemsize if ones else 0), bq), jnp.float32),
                row,
                row,
                pltpu.VMEM((2, blocks.tile_k, bq), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads // groups, groups, queries), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit,
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="flash_attention",
    )(kinds, fetch, q, k, v, *ids)


class _Refs(NamedTuple):
    """Of one step; state is kept from one block of keys to the next."""

    k: Any  # [1, 1, block_k, H]
    v: Any  # [1, 1, H, block_k]
    ids: list[Any]
    q: Any  # state: [G, block_q, H], scaled
    sum: Any  # state: [G, H + ones, block_q], of weights times v, and of weights
    highest: Any  # state: [G, 1, block_q], the largest score so far
    total: Any  # state: [G, 1, block_q], the sum of weights where there are no rows of ones
    scores: Any  # [2, tile_k, block_q]


def _kernel(
    kinds_ref,
    fetch_ref,
    q_ref,
    k_ref,
    v_ref,
    *rest,
    blocks,
    used,
    factor,
    seen,
    reach,
    softcap,
    ones,
    many,
):
    """One block of queries of all heads of a key head, with one block of keys."""
    del fetch_ref
    *ids, out_ref, log_ref, scaled_ref, sum_ref, highest_ref, total_ref, scores_ref = rest
    refs = _Refs(k_ref, v_ref, ids, scaled_ref, sum_ref, highest_ref, total_ref, scores_ref)
    groups, _, dim = scaled_ref.shape
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    kind = kinds_ref[b if many else 0, i, j]

    def of_head(g):
        """Where a head lies in a block of q and of the output."""
        return (0, slice(None), pl.ds(g * dim, dim)) if len(q_ref.shape) == 3 else (0, 0, g)

    @pl.when(j == 0)
    def _():
        for g in range(groups):
            scaled_ref[g] = (q_ref[of_head(g)].astype(jnp.float32) * factor).astype(scaled_ref.dtype)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        highest_ref[...] = jnp.full_like(highest_ref, LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)

    for one in sorted(used - {SKIP}):
        pl.when(kind == one)(functools.partial(_step, refs, blocks, one, seen, reach, softcap, ones))

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        for g in range(groups):
            total = sum_ref[g, dim : dim + 1] if ones else total_ref[g]  # [1, block_q]
            inverse = jnp.where(total > 0, 1.0 / total, 0.0)
            out_ref[of_head(g)] = (sum_ref[g, :dim] * inverse).T.astype(out_ref.dtype)
            log = (highest_ref[g] + jnp.log2(total)) * math.log(2)
            log_ref[0, 0, pl.ds(g, 1)] = jnp.where(total > 0, log, HIDDEN)


def _step(refs: _Refs, blocks: Blocks, kind: int, seen, reach: Reach, softcap: float, ones: int):
    """Adds a block of keys to the sums, tile by tile; the scores of the next tile are made one ahead."""
    tiles = list(tiles_of(refs.q.shape[0], blocks, kind, reach))

    def score(n):
        g, first_q, size_q, first_k, size_k, crossed = tiles[n]
        k = refs.k[0, 0, pl.ds(first_k, size_k), :]
        scores = product(k, refs.q[g, pl.ds(first_q, size_q), :], 1, 1)
        if softcap:
            scores = jnp.tanh(scores) * (softcap * math.log2(math.e))
        if kind == MASKED:
            scores = jnp.where(seen(refs.ids, first_q, size_q, first_k, size_k), scores, HIDDEN)
        elif crossed:
            scores = hide_outside(scores, first_q - first_k - ahead_of(kind, blocks), reach)
        refs.scores[n % 2, :size_k, :size_q] = scores

    score(0)
    for n, (g, first_q, size_q, first_k, size_k, _) in enumerate(tiles):
        if n + 1 < len(tiles):
            score(n + 1)
        here = (g, slice(None), pl.ds(first_q, size_q))
        scores, before = refs.scores[n % 2, :size_k, :size_q], refs.highest[here]
        highest = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
        weights, shrink = jnp.exp2(scores - highest), jnp.exp2(before - highest)
        rows = refs.v[0, 0, :, pl.ds(first_k, size_k)]
        if ones:
            rows = jnp.concatenate([rows, jnp.ones((ones, size_k), rows.dtype)], axis=0)
        else:
            refs.total[here] = refs.total[here] * shrink + weights.sum(axis=0, keepdims=True)
        added = product(rows, weights.astype(rows.dtype), 1, 0)  # [H + ones, size_q]
        refs.sum[here] = refs.sum[here] * shrink + added
        refs.highest[here] = highest


def reach_of(causal: bool, window: int) -> Reach:
    """Of a mask that depends on places alone; window 0 = none."""
    highest = window - 1 if window else FAR
    return (0 if causal else -highest), highest


def ahead_of(kind: int, blocks: Blocks) -> int:
    """How many places a block's first key is ahead of its first query, of the kinds from DIAGONAL on."""
    return (kind - DIAGONAL) * blocks.block_k


def hide_outside(scores: jax.Array, distance: int, reach: Reach) -> jax.Array:
    """scores [keys, queries] with HIDDEN where a query does not reach a key.

    distance: of the first query from the first key.
    """
    (keys, queries), (lowest, highest) = scores.shape, reach
    query = lax.broadcasted_iota(jnp.int32, scores.shape, 1) + distance
    apart = query - lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    if distance - keys < lowest:
        scores = jnp.where(apart >= lowest, scores, HIDDEN)
    if distance + queries > highest:
        scores = jnp.where(apart <= highest, scores, HIDDEN)
    return scores


def tiles_of(
    groups: int, blocks: Blocks, kind: int, reach: Reach
) -> Iterator[tuple[int, int, int, int, int, bool]]:
    """(head, first query, queries, first key, keys, whether the mask crosses it) of what is computed."""
    if kind in (SKIP, WHOLE, MASKED):
        for g in range(groups):
            for first_k in range(0, blocks.block_k, blocks.tile_k):
                yield g, 0, blocks.block_q, first_k, blocks.tile_k, False
        return
    size = blocks.diagonal_tile
    for g in range(groups):
        for first_k in range(0, blocks.block_k, size):
            whole = []  # tiles of queries beside each other that see all keys
            for first_q in range(0, blocks.block_q, size):
                distance = first_q - first_k - ahead_of(kind, blocks)
                least, most = distance - (size - 1), distance + size - 1
                if most < reach[0] or least > reach[1]:
                    continue
                if least >= reach[0] and most <= reach[1]:
                    whole.append(first_q)
                else:
                    yield g, first_q, size, first_k, size, True
            if whole:
                yield g, whole[0], whole[-1] + size - whole[0], first_k, size, False


def visible(ids, first_q, size_q, first_k, size_k, *, causal, window) -> jax.Array:
    """Whether keys [size_k] are seen by queries [size_q], from their positions and segments."""
    of_queries, of_keys = ids
    position, segment = (of_queries[0, n : n + 1, pl.ds(first_q, size_q)] for n in (0, 1))  # [1, size_q]
    key_position, key_segment = (of_keys[0, pl.ds(first_k, size_k), n : n + 1] for n in (0, 1))
    seen = key_segment == segment
    if causal:
        seen &= key_position <= position
    if window:
        seen &= jnp.abs(position - key_position) < window
    return seen


def product(x: jax.Array, y: jax.Array, of_x: int, of_y: int) -> jax.Array:
    """The sum over these axes, in float32; float32 operands are not rounded to bfloat16."""
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = (((of_x,), (of_y,)), ((), ()))
    return lax.dot_general(x, y, axes, precision=exact, preferred_element_type=jnp.float32)
