"""How likely given texts are: the log probability of each token after those before it.

By the forward of training, all tokens of a batch at once; or strictly: a token at a time through pages,
by the very code of an engine with `EngineConfig.strict_numerics`, so that not one bit differs from what
that engine says of the tokens that it made.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax.cache.paged import init_paged, pool_windows
from llm_jax.infer.generate import Compiled, Timing, pad_prompts
from llm_jax.infer.paged_steps import StepShape, make_paged_forward, read_chosen
from llm_jax.infer.steps import score_tokens
from llm_jax.models import Model, Params
from llm_jax.ops.attention import FullContext
from llm_jax.sharding import data_shards, fetch, put_batch, shard


@functools.lru_cache(maxsize=64)
def make_score(model: Model) -> Callable:
    """f(params, tokens [B, T] int32, lengths [B] int32) -> [B, T] float32: place t is of token t + 1."""

    @jax.jit
    def score(params, tokens, lengths):
        net = model.bind(params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        segments = (positions < lengths[:, None]).astype(jnp.int32)
        hidden, _ = net(tokens, positions, FullContext(segments))
        unembed = lambda hidden: shard(net.unembed(hidden), "batch", None, None)  # noqa: E731
        return score_tokens(unembed, hidden, jnp.roll(tokens, -1, axis=1), 0)[0]

    return score


def score_at_once(
    model: Model, params: Params, mesh: Mesh, texts: Sequence[Sequence[int]], compiled: Compiled
) -> list[np.ndarray]:
    """[len(text) - 1] float32 for each text, of its tokens but the first; in one batch."""
    tokens, lengths = pad_prompts(texts, data_shards(mesh))
    with jax.set_mesh(mesh):
        put = lambda x: put_batch(x, mesh)  # noqa: E731
        args = (params, put(tokens), put(lengths))
        found = fetch(compiled.get(make_score(model), Timing(), *args)(*args))
    return [row[: len(text) - 1] for row, text in zip(found, texts, strict=False)]


def score_strictly(
    model: Model,
    params: Params,
    mesh: Mesh,
    texts: Sequence[Sequence[int]],
    compiled: Compiled,
    page_size: int,
) -> list[np.ndarray]:
    """The same by an engine's strict steps; page_size: the engine's, as sums are taken page by page."""
    shards, windows = data_shards(mesh), pool_windows(model.config)
    tokens, lengths = pad_prompts(texts, shards)
    pages = -(-tokens.shape[1] // page_size)
    shape = StepShape(tokens.shape[1], 2, 2, pages, len(windows), scored=True)
    numbers = tuple(1 + pages for _ in windows)
    forward, found = make_paged_forward(model, shape, strict=True), []
    with jax.set_mesh(mesh):
        for first in range(0, len(tokens), shards):
            packed, parts = shape.empty(shards)
            part = slice(first, first + shards)
            parts["tokens"][:], parts["targets"][:] = tokens[part], np.roll(tokens[part], -1, axis=1)
            parts["counts"][:, 0] = parts["lengths"][:, 0] = lengths[part]
            parts["rows"][:] = 1
            for pool in range(len(windows)):
                parts[f"table{pool}"][:, 0] = 1 + np.arange(pages)
            args = (
                params,
                init_paged(model.config, numbers, page_size, mesh),
                put_batch(np.zeros((shards, 1, 1), np.int32), mesh),  # no slot has a newest token
                put_batch(packed, mesh),
            )
            scores = compiled.get(forward, Timing(), *args)(*args).scores
            found.extend(read_chosen(fetch(scores))[1])
    return [row[: len(text) - 1] for row, text in zip(found, texts, strict=False)]
