"""Programs for tests of the laboratory: what goes wrong, what runs on many chips, jax's own kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.paged_attention.paged_attention_kernel import paged_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.tpu.case import Case

HEADS, KV_HEADS, DIM, LENGTH, ROWS = 32, 8, 128, 4096, 32


def paged(page: int, pages_per_block: int, given: bool = True) -> Case:
    """jax's decode attention, 32 rows of 4,096 keys; given: whether the page table is known."""
    pages = LENGTH // page
    cache = jax.ShapeDtypeStruct((KV_HEADS, ROWS * pages, page, DIM), jnp.bfloat16)
    query = jax.ShapeDtypeStruct((ROWS, HEADS, DIM), jnp.bfloat16)
    lengths = np.full(ROWS, LENGTH, np.int32)
    table = np.arange(ROWS * pages, dtype=np.int32).reshape(ROWS, pages)
    if not given:
        lengths, table = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (lengths, table))
    function = functools.partial(paged_attention, pages_per_compute_block=pages_per_block)
    return Case(
        function, (query, cache, cache, lengths, table), hbm_bytes=4 * ROWS * LENGTH * KV_HEADS * DIM
    )


def causal(block: int) -> Case:
    """jax's splash attention, causal: [1, 32, 4096, 128] with 8 key heads; its mask is a constant."""
    sizes = splash.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block)
    mask = masks.MultiHeadMask([masks.CausalMask((LENGTH, LENGTH)) for _ in range(HEADS // KV_HEADS)])
    kernel = splash.make_splash_mqa_single_device(mask, block_sizes=sizes)

    def attend(q, k, v):
        grouped = q.reshape(KV_HEADS, HEADS // KV_HEADS, LENGTH, DIM) * jnp.asarray(DIM**-0.5, q.dtype)
        return jax.vmap(kernel)(grouped, k[0], v[0])

    q = jax.ShapeDtypeStruct((1, HEADS, LENGTH, DIM), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, KV_HEADS, LENGTH, DIM), jnp.bfloat16)
    return Case(attend, (q, k, k), flops=4 * HEADS * DIM * LENGTH**2 // 2)


def row_parallel(devices) -> Case:
    """A product whose inner axis is divided over all chips: it ends in an all-reduce."""
    mesh = Mesh(np.array(devices), ("x",), axis_types=(AxisType.Auto,))
    sharded = lambda *axes: NamedSharding(mesh, P(*axes))  # noqa: E731
    x = jax.ShapeDtypeStruct((1024, 4096), jnp.bfloat16, sharding=sharded(None, "x"))
    w = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=sharded("x", None))
    return Case(jax.jit(jnp.dot, out_shardings=sharded()), (x, w))


def no_case():
    """Not what it should return."""
    return 1
