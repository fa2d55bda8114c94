"""How the scales of 8-bit pages lie in memory: one of a head and token, K heads, pages of Z tokens.

A page's scales are X rows of 128 lanes, those of keys first. Where a page has 128 tokens or more, a row
is one head's for 128 of them, rows in the order (128 tokens, head). In smaller pages heads stand beside
each other in a row, Z lanes each. So nothing is padding, but for heads that do not fill a row.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128


def scale_rows(kv_heads: int, page: int) -> int:
    """X, the rows of a page's scales."""
    return 2 * (kv_heads * page // LANES if page >= LANES else -(-kv_heads // (LANES // page)))


def scale_places(kv_heads: int, page: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, lane) in [X, 128], each [2, K, Z], of the scales of keys and values."""
    of_values, head, token = np.meshgrid(range(2), range(kv_heads), range(page), indexing="ij")
    half = scale_rows(kv_heads, page) // 2
    if page >= LANES:
        return of_values * half + token // LANES * kv_heads + head, token % LANES
    beside = LANES // page
    return of_values * half + head // beside, head % beside * page + token


def spread_scales(scales: jax.Array, page: int) -> jax.Array:
    """[R, 2, K] of one token a row -> [R, X, 128]: a page's scales if all its tokens were that one."""
    count, _, kv_heads = scales.shape
    rows = scale_rows(kv_heads, page)
    if page >= LANES:
        wide = jnp.tile(scales, (1, 1, page // LANES)).reshape(count, rows, 1)
        return jnp.broadcast_to(wide, (count, rows, LANES))
    beside = LANES // page
    padded = jnp.pad(scales, ((0, 0), (0, 0), (0, -kv_heads % beside)))
    return jnp.repeat(padded.reshape(count, rows, beside), page, axis=2)


def token_of_lane(shape: tuple[int, ...], page: int, kv_heads: int) -> jax.Array:
    """Which of a page's tokens the scales at each place of [X, 128] are of."""
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    if page < LANES:
        return lane % page
    return lax.broadcasted_iota(jnp.int32, shape, 0) // kv_heads % (page // LANES) * LANES + lane


def page_scales(scales: jax.Array, page: int, kv_heads: int) -> jax.Array:
    """Scales [Z, 128] of a page's tokens, lanes of keys' heads and then values' -> [X, 128]."""
    if page >= LANES:
        tiles = [scales[first : first + LANES].T for first in range(0, page, LANES)]
        halves = [[t[i * kv_heads : (i + 1) * kv_heads] for t in tiles] for i in range(2)]
        return jnp.concatenate(halves[0] + halves[1], axis=0)
    heads = jnp.concatenate([scales, jnp.zeros((LANES - page, LANES), scales.dtype)], axis=0).T
    beside, half = LANES // page, scale_rows(kv_heads, page) // 2
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1) // page
    rows = []
    for i in range(2):
        for r in range(half):
            row = jnp.zeros((1, LANES), scales.dtype)
            for n in range(min(beside, kv_heads - r * beside)):
                head = heads[i * kv_heads + r * beside + n][None]
                row = jnp.where(lane == n, pltpu.roll(head, n * page, 1) if n else head, row)
            rows.append(row)
    return jnp.concatenate(rows, axis=0)


def block_scales(scales, i: int, kv_heads: int, page: int) -> jax.Array:
    """[K, S] of the keys (i = 0) or values (1) of a block of pages, from a reference [pages, X, 128]."""
    at_once, rows, _ = scales.shape
    half = rows // 2
    if page >= LANES:
        return jnp.concatenate(
            [
                scales[p, pl.ds(i * half + c * kv_heads, kv_heads)]
                for p in range(at_once)
                for c in range(page // LANES)
            ],
            axis=1,
        )
    return jnp.concatenate(
        [
            jnp.concatenate([_turned(scales, first, i * half + r, page) for r in range(half)])
            for first in range(0, at_once, LANES // page)
        ],
        axis=1,
    )[:kv_heads]


def _turned(scales, first: int, row: int, page: int) -> jax.Array:
    """A row of several pages, [pages, (heads, Z)] -> [heads, (pages, Z)]; both fill 128 lanes."""
    count = LANES // page
    pages = scales[pl.ds(first, count), row]
    ahead = lax.broadcasted_iota(jnp.int32, pages.shape, 1) // page
    ahead -= lax.broadcasted_iota(jnp.int32, pages.shape, 0)
    out = pages
    for d in range(1, count):  # what goes d places on, around the end
        moved = pltpu.roll(jnp.concatenate([pages[d:], pages[:d]], axis=0), d * page, 1)
        out = jnp.where(ahead % count == d, moved, out)
    return out
