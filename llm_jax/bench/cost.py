"""What a step must read or compute at least, from a model's shapes; and what the machine can move."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llm_jax.models import Model
from llm_jax.models.cost import forward_flops
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


def prefill_flops(model: Model, batch: int, tokens: int) -> int:
    """Floating point operations of prompts [batch, tokens], to the logits of each row's last token.

    As `forward_flops` counts, but of a causal mask what it leaves alone: (tokens + 1) / 2 keys a token.
    """
    cfg = model.config
    vocabulary = 2 * cfg.vocab_size * cfg.embed_dim * batch * (tokens - 1)
    return forward_flops(model, batch * tokens, (tokens + 1) // 2) - vocabulary


def read_bandwidth(megabytes: int = 512, repeats: int = 7) -> float:
    """Bytes per second at which XLA sums an array much larger than the caches; the best of `repeats`."""
    values = jnp.ones((megabytes << 20) // 4, jnp.float32).reshape(-1, 1024)
    total = jax.jit(lambda x: jnp.ones((1, x.shape[1]), x.dtype) @ x.T)
    return values.nbytes / _least_seconds(total, values, repeats)


def copy_bandwidth(megabytes: int = 2048, repeats: int = 7) -> float:
    """Bytes per second, read and written, at which a device copies; the best of `repeats`."""
    values = jnp.ones((megabytes << 20) // 4, jnp.float32)
    copied = jax.jit(lambda x: x + 1)  # a bare copy may be none
    return 2 * values.nbytes / _least_seconds(copied, values, repeats)


def _least_seconds(function: Callable[[jax.Array], jax.Array], values: jax.Array, repeats: int) -> float:
    """Of one call, after one that compiles it."""
    function(values).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function(values).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return best
