"""Paged attention at shapes of models: `python scripts/kernel_report.py --kernel=paged_attention`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.cases import KernelCase, sizes
from llm_jax.kernels.chips import ChipRule, chip_rule
from llm_jax.kernels.paged_attention.api import decode_key, paged_attention, size_rule
from llm_jax.kernels.paged_attention.tpu_decode import DecodeSizes
from llm_jax.kernels.paged_attention.types import CHUNK_ALIGNMENT, Rows, abstract_pages
from llm_jax.kernels.tuning import Tuning, distinct


def case(
    shape: str = "32x32x8x4096x128",
    page: int = 128,
    dtype: str = "bfloat16",
    chunk: int = 0,
    chunks: int = 4,
    window: int = 0,
    softcap: float = 0.0,
    layers: int = 1,
    pages_at_once: int = 0,
    buffers: int = 0,
) -> KernelCase:
    """shape: rows with one new token x query heads x key heads x tokens of a row x head dim.

    dtype: of the pages; queries are bfloat16. chunk: new tokens of each of `chunks` more rows, as long
    as the others. pages_at_once and buffers: see `tpu_decode.DecodeSizes`; 0 = tuned or by the rule.
    Needed bytes are those of keys and values, once.
    """
    singles, heads, kv_heads, tokens, dim = sizes(shape, "BNKSH")
    if bool(pages_at_once) != bool(buffers):
        raise ValueError(f"pages_at_once={pages_at_once}, buffers={buffers}: give both or none")
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
    if pages_at_once:
        by_rule = size_rule(chip_rule(), q, pages, per_row)
        decode = DecodeSizes(pages_at_once, buffers)
        function = functools.partial(function, sizes=dataclasses.replace(by_rule, decode=decode))
    seen = min(tokens, window) if window else tokens
    moved = singles * seen * 2.0 * kv_heads * dim * pages.tokens.dtype.itemsize
    pairs = singles * seen + (rows - singles) * (chunk * tokens - chunk * chunk / 2)
    flops = 4.0 * heads * dim * pairs
    if chunk:  # bound by the matrix units, whatever the window
        moved = 0.0
    args = (q, k, k, pages, described, number(0))
    return KernelCase(jax.jit(function, donate_argnums=3), args, flops, moved)


TUNED: tuple[dict[str, Any], ...] = tuple(
    {"shape": shape, "page": page, "dtype": dtype}
    for shape in ("32x32x8x4096x128", "32x4x1x4096x128")  # Llama-3-8B, and one of eight chips
    for page in (16, 128)
    for dtype in ("bfloat16", "int8")
)


def tuning(rule: ChipRule, shape: str, page: int = 128, dtype: str = "bfloat16") -> Tuning:
    """Sizes to try for rows with one new token, of such a `case`."""
    options = {"shape": shape, "page": page, "dtype": dtype}
    q, _, _, pages, rows, _ = case(**options).args
    pages_of_row = rows.table.shape[1]
    at_once, buffers = size_rule(rule, q, pages, pages_of_row).decode
    tried = [
        (at_once, buffers),
        (max(at_once // 2, 1), buffers),
        (max(at_once // 2, 1), buffers + 1),
        (min(at_once * 2, pages_of_row), buffers),
        (max(at_once // 4, 1), buffers + 1),
    ]
    candidates = distinct([DecodeSizes(*sizes)._asdict() for sizes in tried])
    return Tuning(decode_key(q, pages, rows.starts.shape[0], pages_of_row), options, candidates)
