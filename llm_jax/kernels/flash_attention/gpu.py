"""Flash attention for NVIDIA GPUs, forward (Dao et al. 2022, 2023), in Pallas Triton.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, H head dim; tiles of `block_q`
queries and `block_k` keys; I and J tiles of them.

* A program has one tile of queries of one head and goes through its keys, tile by tile: the scores and
  the running sums stay in registers, keys and values come through shared memory some tiles ahead
  (Triton pipelines the loop), by way of the L2 cache that the heads of a key head share.
* The loop is cut in parts, so that only tiles that an edge of the mask crosses are masked, and hidden
  ones are not visited. Of one sequence beside itself the bounds follow from the tile's index (`span`);
  else they are lists, made before (`visits`).
* Triton takes powers of two: other head dims are loaded with zeros behind them.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from llm_jax.kernels.chips import GpuRule
from llm_jax.kernels.flash_attention.plan import plan_by_ids
from llm_jax.kernels.flash_attention.tpu import (
    FAR,
    HIDDEN,
    LOWEST,
    SKIP,
    WHOLE,
    Blocks,
    Reach,
    product,
)
from llm_jax.kernels.triton import plgpu

LOG2_E = math.log2(math.e)


class Tile(NamedTuple):
    """What a program computes at a time, and how: warps that share it, tiles in flight."""

    block_q: int
    block_k: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Of the forward kernel and those of the gradients."""

    forward: Tile
    of_keys: Tile
    of_queries: Tile


def tile_rule(rule: GpuRule, dim: int, itemsize: int) -> Tiles:
    """The largest tiles that a GPU's registers and shared memory hold, by what ptxas says of them.

    What lies in registers are the sums, float32 [block_q, H] (twice [block_k, H] for keys), and two
    tiles of scores. Hopper's matrix units take operands from shared memory, older ones from registers
    too; float32 is computed without them, from registers. docs/kernels.md has the figures.
    """
    wide, hopper, roomy = head_width(dim) > 128, rule.capability >= 90, rule.shared_bytes > 128 << 10
    if itemsize == 4:
        if wide:
            return Tiles(*[Tile(16, 16, 8, 1)] * 3)
        return Tiles(Tile(32, 16, 4, 2), Tile(16, 16, 4, 2), Tile(16, 16, 4, 2))
    if wide and hopper:
        return Tiles(Tile(128, 64, 8, 2), Tile(32, 64, 8, 2), Tile(128, 32, 8, 2))
    if wide:
        return Tiles(
            Tile(64, 32, 8, 2), Tile(32, 64 if roomy else 32, 8, 2), Tile(64, 32, 8, 2 if roomy else 1)
        )
    if hopper:
        return Tiles(Tile(128, 128, 8, 2), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2))
    return Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2))


def head_width(dim: int) -> int:
    """The power of two that a head dim is computed as."""
    return max(16, pl.next_power_of_2(dim))


@dataclasses.dataclass(frozen=True)
class Spec:
    """What all kernels are told besides arrays.

    reach: the least and the most places from a key to a query that sees it; offset: of query 0 among
    its keys. Where there are ids, places come from them.
    """

    tiles: Tiles
    scale: float
    softcap: float
    reach: Reach
    offset: int
    interpret: bool

    @property
    def factor(self) -> float:
        """Of products, that makes them scores to the base of 2, or what tanh takes."""
        return self.scale / self.softcap if self.softcap else self.scale * LOG2_E


class Visits(NamedTuple):
    """Which tiles to visit where that depends on data, and the ids that say what is seen in them.

    order [B or 1, I, J] int32: tiles of keys for each of queries (or the other way round), those seen
    whole first, then those to mask. counts [B or 1, I, 2] int32: how many of them are whole, and how
    many there are. of_queries [B, 2, I block_q], of_keys [B, 2, J block_k] int32: places and segments.
    """

    order: Any
    counts: Any
    of_queries: Any
    of_keys: Any


def visits_by_ids(
    of_queries: jax.Array,
    of_keys: jax.Array,
    causal: bool,
    window: int,
    tile: Tile,
    block_mask: jax.Array | np.ndarray | None,
    blocks: Blocks | None,
    *,
    by_keys: bool,
) -> Visits:
    """What a kernel with such tiles visits for ids [B, 2, T] and [B, S, 2], as `plan_by_ids` takes them.

    block_mask: of `blocks`, multiples of the tiles. by_keys: tiles of queries for each of keys.
    """
    sizes = Blocks(tile.block_q, tile.block_k, tile.block_k, tile.block_k)
    kinds, _ = plan_by_ids(of_queries, of_keys, causal, window, sizes)
    if block_mask is not None and blocks is not None:
        seen = jnp.repeat(jnp.asarray(block_mask), blocks.block_q // tile.block_q, axis=1)
        seen = jnp.repeat(seen, blocks.block_k // tile.block_k, axis=2)
        kinds = jnp.where(seen, kinds, SKIP)
    if by_keys:
        kinds = kinds.transpose(0, 2, 1)
    late = jnp.where(kinds == WHOLE, 0, jnp.where(kinds == SKIP, 2, 1))
    counts = jnp.stack([(late == 0).sum(axis=-1), (late < 2).sum(axis=-1)], axis=-1)
    order = jnp.argsort(late, axis=-1, stable=True)
    return Visits(
        order.astype(jnp.int32), counts.astype(jnp.int32), of_queries, of_keys.transpose(0, 2, 1)
    )


def flash_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, visits: Visits | None, spec: Spec
) -> tuple[jax.Array, jax.Array]:
    """(output in the shape and dtype of q, log of the sums of exponentials [B, N, T] float32).

    q [B, T, N, H], k and v [B, K, S, H], of any lengths. visits: None where reach and offset say it all.
    """
    (batch, queries, heads, dim), (_, kv_heads, keys, _) = q.shape, k.shape
    tile, width, groups = spec.tiles.forward, head_width(dim), heads // kv_heads
    count = pl.cdiv(queries, tile.block_q)
    own = lambda i, n, b: count - 1 - i  # noqa: E731, longest first, of a causal mask
    of_queries = pl.BlockSpec(
        (None, tile.block_q, None, width), lambda *ids: (ids[2], own(*ids), ids[1], 0)
    )
    of_keys = pl.BlockSpec((None, None, keys, width), lambda i, n, b: (b, n // groups, 0, 0))
    return pl.pallas_call(
        functools.partial(_kernel, dim=dim, queries=queries, keys=keys, spec=spec),
        grid=(count, heads, batch),
        in_specs=[of_queries, of_keys, of_keys, *visit_specs(visits, tile.block_q, None, own)],
        out_specs=[
            of_queries,
            pl.BlockSpec((None, None, tile.block_q), lambda *ids: (ids[2], ids[1], own(*ids))),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=spec.interpret,
        name="flash_attention",
    )(q, k, v, *(visits or ()))


def visit_specs(visits: Visits | None, block_q: int | None, block_k: int | None, at) -> list:
    """Of the arrays of visits: a program's own tile, number at(*program ids), or with None all ids."""
    if visits is None:
        return []
    many = visits.order.shape[0] > 1

    def listed(x):
        return pl.BlockSpec((None, None, x.shape[2]), lambda *ids: (ids[2] if many else 0, at(*ids), 0))

    def ids(x, size):
        if size is None:
            return pl.BlockSpec((None, 2, x.shape[2]), lambda *ids: (ids[2], 0, 0))
        return pl.BlockSpec((None, 2, size), lambda *ids: (ids[2], 0, at(*ids)))

    of_queries, of_keys = ids(visits.of_queries, block_q), ids(visits.of_keys, block_k)
    return [listed(visits.order), listed(visits.counts), of_queries, of_keys]


def _kernel(q_ref, k_ref, v_ref, *rest, dim: int, queries: int, keys: int, spec: Spec):
    """One tile of queries of a head."""
    *given, out_ref, log_ref = rest
    visits, tile = Visits(*given) if given else None, spec.tiles.forward
    i = pl.num_programs(0) - 1 - pl.program_id(0)
    first, size = i * tile.block_q, tile.block_k
    rows = first + jnp.arange(tile.block_q)
    q = load(q_ref, rows < queries, dim)

    def of_tile(masked, j, carry):
        out, highest, total = carry
        place, at = j * size + jnp.arange(size), pl.ds(j * size, size)
        k, v = (load(x.at[at], place < keys if masked else None, dim) for x in (k_ref, v_ref))
        scores = scores_of(product(q, k, 1, 1), spec)
        if masked:
            query, key = ids_of(visits, rows, slice(None), place, at, spec)
            seen = visible([x[:, None] for x in query], [x[None] for x in key], spec.reach)
            scores = jnp.where(seen & (place < keys)[None], scores, HIDDEN)
        now = jnp.maximum(highest, scores.max(axis=1))
        weights, shrink = jnp.exp2(scores - now[:, None]), jnp.exp2(highest - now)
        out = out * shrink[:, None] + product(weights.astype(v.dtype), v, 1, 0)
        return out, now, total * shrink + weights.sum(axis=1)

    carry = (
        jnp.zeros((tile.block_q, q.shape[1]), jnp.float32),
        jnp.full((tile.block_q,), LOWEST, jnp.float32),
        jnp.zeros((tile.block_q,), jnp.float32),
    )
    bounds = span(first + spec.offset, tile.block_q, size, keys, spec.reach)
    out, highest, total = over_parts(of_tile, carry, bounds, visits)
    inverse = jnp.where(total > 0, 1.0 / total, 0.0)
    store(out_ref, (out * inverse[:, None]).astype(out_ref.dtype), rows < queries, dim)
    log = jnp.where(total > 0, (highest + jnp.log2(total)) / LOG2_E, HIDDEN)
    store(log_ref, log, rows < queries)


def scores_of(products: jax.Array, spec: Spec) -> jax.Array:
    """Scores to the base of 2."""
    if spec.softcap:
        return jnp.tanh(products * spec.factor) * (spec.softcap * LOG2_E)
    return products * spec.factor


def ids_of(visits: Visits | None, rows, at_q, place, at_k, spec: Spec):
    """What `visible` compares, of queries `rows` and of keys at `place`: (places, segments, if any)."""
    if visits is None:
        return [rows + spec.offset], [place]
    return [visits.of_queries[n, at_q] for n in (0, 1)], [visits.of_keys[n, at_k] for n in (0, 1)]


def visible(query: list[jax.Array], key: list[jax.Array], reach: Reach) -> jax.Array:
    """Whether queries see keys, from what `ids_of` gave, with axes of size 1 where the other has its."""
    (least, most), apart = reach, query[0] - key[0]
    seen = query[1] == key[1] if len(query) > 1 else apart > -FAR
    if least > -FAR:
        seen &= apart >= least
    if most < FAR:
        seen &= apart <= most
    return seen


Bound = Any  # an int, or a traced one


def span(first: Bound, size: int, step: int, length: int, reach: Reach) -> tuple[Bound, ...]:
    """Which tiles of `step` keys, of `length`, queries at places first <= p < first + size see.

    (begin, inner begin, inner end, end): tiles begin <= j < end hold all that they see, and of the inner
    ones they see all. With reach and offset turned around, the same for a tile of keys.
    """
    (least, most), last = reach, first + size - 1
    begin, inner, inner_end, end = 0, 0, length // step, pl.cdiv(length, step)
    if least > -FAR:
        end = jnp.clip(lax.div(jnp.maximum(last - least + step, 0), step), 0, end)
        inner_end = jnp.minimum(lax.div(jnp.maximum(first - least + 1, 0), step), inner_end)
    if most < FAR:
        begin = jnp.minimum(lax.div(jnp.maximum(first - most, 0), step), end)
        inner = lax.div(jnp.maximum(last - most + step - 1, 0), step)
        inner = jnp.clip(inner, begin, end)
    if least > -FAR or most < FAR:
        inner_end = jnp.clip(inner_end, inner, end)
    return begin, inner, inner_end, end


def over_parts(of_tile, carry, bounds: tuple[Bound, ...], visits: Visits | None, heads: int = 0):
    """of_tile(masked, j, carry) for the tiles within bounds, or for those that visits list.

    heads: of_tile(masked, j, carry, g) for each of so many, if not 0, in one loop that stays pipelined.
    """
    if visits is None:
        begin, inner, inner_end, end = bounds
        parts = ((begin, inner, True), (inner, inner_end, False), (inner_end, end, True))
    else:
        whole, there = visits.counts[0], visits.counts[1]
        parts = ((0, whole, False), (whole, there, True))
    for low, high, masked in parts:

        def body(n, carry, low=low, high=high, masked=masked):
            head = ()
            if heads:
                head, n = (lax.div(n, high - low),), low + lax.rem(n, high - low)
            return of_tile(masked, n if visits is None else visits.order[n], carry, *head)

        if isinstance(low, int) and isinstance(high, int) and low >= high:
            continue
        if heads:
            carry = lax.fori_loop(0, heads * (high - low), body, carry)
        else:
            carry = lax.fori_loop(low, high, body, carry)
    return carry


def load(ref, here: jax.Array | None, dim: int = 0) -> jax.Array:
    """A tile: rows that are `here` (None = all), of [rows, width] the columns below dim; 0 elsewhere."""
    mask = _inside(ref, here, dim)
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0.0)


def store(ref, value: jax.Array, here: jax.Array, dim: int = 0) -> None:
    """The way back."""
    plgpu.store(ref, value, mask=_inside(ref, here, dim))


def _inside(ref, here: jax.Array | None, dim: int) -> jax.Array | None:
    if len(ref.shape) == 1:
        return here
    columns = None if dim == ref.shape[1] else (jnp.arange(ref.shape[1]) < dim)[None]
    if here is None or columns is None:
        return columns if here is None else here[:, None]
    return here[:, None] & columns
