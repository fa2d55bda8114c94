"""What a decode step must read at least, from a model's shapes; and what the machine can read."""

import time

import jax
import jax.numpy as jnp

from llm_jax.models import Model
from llm_jax.tree import flatten, num_bytes


def decode_bytes(model: Model, batch: int, context: int) -> int:
    """Bytes one decode step reads: every weight once, and the keys and values of `context` tokens.

    Of tables that are looked up (token and position embeddings) only the rows used count, unless the
    token table is also the vocabulary projection.
    """
    cfg = model.config
    weights = num_bytes(model.shapes)
    looked_up = {"embed/positions", "embed/types", *(() if cfg.tie_embeddings else ("embed/tokens",))}
    weights -= sum(num_bytes(s) for path, s in flatten(model.shapes).items() if path in looked_up)
    slots = sum(min(w, context) if w else context for w in cfg.layer_windows)
    itemsize = jnp.dtype(cfg.cache_dtype).itemsize
    return weights + batch * slots * cfg.num_kv_heads * cfg.head_dim * 2 * itemsize


def read_bandwidth(megabytes: int = 512, repeats: int = 7) -> float:
    """Bytes per second at which XLA sums an array much larger than the caches; the best of `repeats`."""
    values = jnp.ones((megabytes << 20) // 4, jnp.float32).reshape(-1, 1024)
    total = jax.jit(lambda x: jnp.ones((1, x.shape[1]), x.dtype) @ x.T)
    total(values).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        total(values).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return values.nbytes / best
