"""Flash attention at shapes of models: `python scripts/kernel_report.py --kernel=flash_attention`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.cases import KernelCase, sizes
from llm_jax.kernels.chips import ChipRule
from llm_jax.kernels.flash_attention.api import block_rule, blocks_key, flash_attention
from llm_jax.kernels.flash_attention.tpu import LANES, Blocks, heads_at_once
from llm_jax.kernels.tuning import Tuning, distinct


def case(
    shape: str = "1x32x8x4096x128",
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    documents: int = 0,
    gradient: bool = False,
    dtype: str = "bfloat16",
    block_q: int = 0,
    block_k: int = 0,
    tile_k: int = 0,
    diagonal_tile: int = 0,
) -> KernelCase:
    """shape: B x query heads x key heads x tokens x head dim. documents: packed into a row, 0 = not
    packed.

    gradient: forward and backward together, which need two and five products of the size of the scores.
    block_q and the other sizes: see `tpu.Blocks`; 0 = tuned or by the rule. Operations are counted
    for what a query sees of a plain or causal mask.
    """
    batch, heads, kv_heads, tokens, dim = sizes(shape, "BNKTH")
    q = jax.ShapeDtypeStruct((batch, tokens, heads, dim), dtype)
    k = jax.ShapeDtypeStruct((batch, kv_heads, tokens, dim), dtype)
    given = (block_q, block_k, tile_k, diagonal_tile)
    if any(given) and not all(given):
        raise ValueError(f"block_q, block_k, tile_k, diagonal_tile of {given}: give all of them or none")
    function = functools.partial(
        flash_attention,
        scale=dim**-0.5,
        causal=causal,
        window=window,
        softcap=softcap,
        implementation="pallas",
        blocks=Blocks(*given) if all(given) else None,
    )
    seen = tokens**2 / 2 if causal else tokens**2
    flops = 2.0 * (7 if gradient else 2) * batch * heads * dim * seen
    passes = 4 if gradient else 2  # q, k, v and the result; again, with its gradient, and theirs
    moved = passes * (heads + kv_heads) * batch * tokens * dim * jnp.dtype(dtype).itemsize
    if not documents:
        arrays = (q, k, k)
        return KernelCase(_with_gradient(function) if gradient else function, arrays, flops, moved)
    ids = np.arange(tokens, dtype=np.int32) * documents // tokens
    row = np.broadcast_to(ids, (batch, tokens)).copy()
    place = np.broadcast_to(np.arange(tokens, dtype=np.int32), (batch, tokens)).copy()

    def packed(q, k, v, place, row):
        options = {"positions": (place, place), "segments": (row, row)}
        masked = functools.partial(function, **options)
        return (_with_gradient(masked) if gradient else masked)(q, k, v)

    return KernelCase(packed, (q, k, k, place, row), flops / documents, moved)


def _with_gradient(function):
    """f(q, k, v) -> the gradients of q, k and v for a gradient of the output that is the output."""

    def gradients(q, k, v):
        (out, _), back = jax.vjp(function, q, k, v)
        return back((out, jnp.zeros((out.shape[0], out.shape[2], out.shape[1]), jnp.float32)))

    return gradients


TUNED: tuple[dict[str, Any], ...] = tuple(
    {"shape": shape}
    for shape in (
        "1x32x8x4096x128",  # Llama-3-8B, Qwen3-4B and -8B; likewise one of eight chips
        "1x16x8x4096x128",  # Qwen3-0.6B and -1.7B
        "1x12x12x1024x64",  # GPT-2
        "1x8x4x4096x256",  # Gemma-2-2B
    )
)


def tuning(rule: ChipRule, shape: str, dtype: str = "bfloat16") -> Tuning:
    """Blocks to try, of a causal `case`; the gradient, which takes the same, must not get slower."""
    _, heads, kv_heads, tokens, dim = sizes(shape, "BNKTH")
    groups = heads_at_once(heads // kv_heads)
    q, k, tile, diagonal = dataclasses.astuple(
        block_rule(rule, groups, dim, jnp.dtype(dtype).itemsize).fitted(tokens, tokens)
    )
    # More queries do not fit where there are not 1024, and take the compiler minutes where there are;
    # fewer cost more.
    tried = [
        Blocks(q, k, tile, diagonal),
        Blocks(q, k, tile, max(diagonal // 2, LANES)),
        Blocks(q, max(k // 2, LANES), tile, diagonal),
    ]
    candidates = distinct([dataclasses.asdict(b.fitted(tokens, tokens)) for b in tried])
    key = blocks_key(dtype, groups, dim, tokens)
    return Tuning(key, {"shape": shape, "dtype": dtype}, candidates, ({"gradient": True},))
