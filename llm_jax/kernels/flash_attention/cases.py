"""Flash attention at shapes of models: `python scripts/kernel_report.py --kernel=flash_attention`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.cases import KernelCase, sizes
from llm_jax.kernels.flash_attention.api import flash_attention
from llm_jax.kernels.flash_attention.tpu import Blocks


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
    block_q and the other sizes: see `tpu.Blocks`; 0 = by the rule of the chip. Operations are counted
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
