"""Paged attention at shapes of models: `python scripts/kernel_report.py --kernel=paged_attention`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.cases import KernelCase, sizes
from llm_jax.kernels.paged_attention.api import paged_attention
from llm_jax.kernels.paged_attention.types import CHUNK_ALIGNMENT, Rows, abstract_pages


def case(
    shape: str = "32x32x8x4096x128",
    page: int = 128,
    dtype: str = "bfloat16",
    chunk: int = 0,
    chunks: int = 4,
    window: int = 0,
    softcap: float = 0.0,
    layers: int = 1,
) -> KernelCase:
    """shape: rows with one new token x query heads x key heads x tokens of a row x head dim.

    dtype: of the pages; queries are bfloat16. chunk: new tokens of each of `chunks` more rows, as long
    as the others. Needed bytes are those of keys and values, once.
    """
    singles, heads, kv_heads, tokens, dim = sizes(shape, "BNKSH")
    rows = singles + (chunks if chunk else 0)
    per_row = -(-tokens // page)
    first = -(-singles // CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT
    room = -(-chunk // CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT
    count = first + chunks * room if chunk else singles
    number = functools.partial(np.array, dtype=np.int32)
    described = Rows(
        table=number(np.random.default_rng(0).permutation(rows * per_row).reshape(rows, per_row)),
        starts=number([*range(singles), *(first + i * room for i in range(rows - singles))]),
        counts=number([1] * singles + [chunk] * (rows - singles)),
        lengths=number([tokens] * rows),
        decodes=number(singles),
        rows=number(rows),
    )
    pages = abstract_pages(layers, rows * per_row, page, kv_heads, dim, dtype)
    q = jax.ShapeDtypeStruct((count, heads, dim), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((count, kv_heads, dim), jnp.bfloat16)
    function = functools.partial(
        paged_attention, scale=dim**-0.5, window=window, softcap=softcap, implementation="pallas"
    )
    seen = min(tokens, window) if window else tokens
    moved = singles * seen * 2.0 * kv_heads * dim * pages.tokens.dtype.itemsize
    pairs = singles * seen + (rows - singles) * (chunk * tokens - chunk * chunk / 2)
    flops = 4.0 * heads * dim * pairs
    if chunk:  # bound by the matrix units, whatever the window
        moved = 0.0
    args = (q, k, k, pages, described, number(0))
    return KernelCase(jax.jit(function, donate_argnums=3), args, flops, moved)
