"""What paged attention works on: the pages, and the rows of one step.

Letters: T tokens, R rows, K key/value heads, H head dim, L layers, P pages of Z tokens, M pages of
a row.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from llm_jax.kernels.chips import RULES
from llm_jax.kernels.paged_attention.scales import LANES, scale_rows

CHUNK_ALIGNMENT = 16  # tokens; where a row of several new tokens may begin
EIGHT_BITS = {  # the largest number that scales map a head's largest to
    jnp.dtype(jnp.int8): 127.0,
    jnp.dtype(jnp.float8_e4m3fn): 448.0,
    jnp.dtype(jnp.float8_e5m2): 57344.0,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """Keys and values of all layers. 8-bit pages have a scale for each token and head, see `scales`."""

    tokens: jax.Array  # [L, P, 2, Z, K H], keys, then values; a token's heads side by side
    scales: jax.Array | None  # [L, P, X, 128] float32

    @property
    def page_size(self) -> int:
        """Z, tokens of a page."""
        return self.tokens.shape[3]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of one step, int32. Rows with a single new token come first.

    Those `decodes` rows have their tokens at 0, 1, 2 ...; each row after them begins at a multiple of
    16. What lies between is padding. Numbers of pages that a row does not see may be any of the pool.
    """

    table: jax.Array  # [R, M], a row's pages
    starts: jax.Array  # [R], its first new token among the T
    counts: jax.Array  # [R], its new tokens, one at least
    lengths: jax.Array  # [R], all its tokens, the new ones too
    decodes: jax.Array  # [], rows with a single new token
    rows: jax.Array  # [], rows that there are


def heads_held(kv_heads: int, head_dim: int, kind: str) -> int:
    """For how many heads pages should have room: `kv_heads`, or on a TPU as many as fill its 128 lanes.

    A TPU pads the last axis to them. Where its compiler finds that too much it has another axis last,
    and as kernels read pages as they are it would copy all of them to and fro in every step.
    """
    whole = LANES // math.gcd(LANES, head_dim) if kind in RULES else 1
    return -(-kv_heads // whole) * whole


def abstract_pages(
    layers: int, pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: jax.typing.DTypeLike
) -> Pages:
    """The shapes of a pool of pages.

    Raises ValueError for a dtype that pages cannot have and, of 8-bit pages, for a size that neither
    divides 128 nor is a multiple of it.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in EIGHT_BITS and dtype not in (jnp.float32, jnp.bfloat16):
        known = [str(x) for x in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16), *EIGHT_BITS)]
        raise ValueError(f"dtype={dtype}: pages are of {', '.join(known)}")
    if page_size < 8 or page_size % 8:
        raise ValueError(f"page_size={page_size}: expected a multiple of 8, such as 16 or 128")
    tokens = jax.ShapeDtypeStruct((layers, pages, 2, page_size, kv_heads * head_dim), dtype)
    if dtype not in EIGHT_BITS:
        return Pages(tokens, None)
    if 128 % page_size and page_size % 128:
        raise ValueError(
            f"page_size={page_size}: of {dtype} pages, expected 16, 32, 64 or a multiple of 128"
        )
    rows = scale_rows(kv_heads, page_size)
    return Pages(tokens, jax.ShapeDtypeStruct((layers, pages, rows, 128), jnp.float32))


def init_pages(*shape: int, dtype: jax.typing.DTypeLike) -> Pages:
    """A pool of empty pages; see `abstract_pages`."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_pages(*shape, dtype))
