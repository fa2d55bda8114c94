"""Layers in stages: each device of the mesh axis "stage" has a part of the layers, and batches pass by.

Letters: B batch, T tokens, D embed, S stages, M microbatches, a multiple of S.

    tick            0     1     2     3     4     5     6        M = 4, S = 3
    stage 0        m0    m1    m2    m3     .     .     .
    stage 1         .    m0    m1    m2    m3     .     .
    stage 2         .     .    m0    m1    m2    m3     .

A batch is cut into M parts of its rows. In each of M + S - 1 ticks a stage runs its layers on one of
them and hands it to the next stage (GPipe, Huang et al. 2019, arXiv:1811.06965); the gradient of that
program is the same pipeline backwards. S - 1 of the ticks a stage has nothing to do, and computes what
nobody reads: the share (S - 1) / (M + S - 1) of the time.

Only "stage" is mapped by hand. Within a stage all other axes of the mesh split weights and activations
as without it. Outside, "stage" is one more data axis: a stage embeds and unembeds its share of the rows,
so these are gathered when they enter, and the last stage deals them out again.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.ops.attention import FullContext
from llm_jax.sharding import data_shards, on_stages, shard, stages

AXIS = "stage"
Layers = Callable[[Any, jax.Array, jax.Array, FullContext], tuple[jax.Array, FullContext]]


def through_stages(
    run: Layers, layers: Any, x: jax.Array, positions: jax.Array, context: Any, microbatches: int
) -> tuple[jax.Array, FullContext]:
    """run(layers, x, positions, context) in the stages of the mesh that is set: x [B, T, D] and context.

    layers: a tree of arrays [L, ...], of which `run` is given parts. Dropout differs from that of one
    stage, as each microbatch draws its own. ValueError where the rows cannot be cut.
    """
    if not isinstance(context, FullContext):
        raise ValueError(
            f"--mesh has stage={stages()}: stages are for training and for encoders, not for "
            f"{type(context).__name__}; take fsdp or tensor in place of stage"
        )
    count = _checked(len(x), microbatches)
    rows = (x, positions, context.segment_ids, context.routing)

    def on_stage(layers, rows, key):
        return _pipeline(run, layers, rows, key, count)

    x, routing = on_stages(on_stage, (True, True, False))(layers, rows, context.dropout_key)
    return shard(x, "batch", "seq", "embed"), dataclasses.replace(context, routing=routing)


def _checked(rows: int, microbatches: int) -> int:
    """How many microbatches there are; ValueError when so many rows cannot be cut into them."""
    size, count = stages(), microbatches or stages()
    if count % size:
        raise ValueError(
            f"microbatches={count}: expected a multiple of the stages of --mesh, stage:{size}, "
            "or 0 for as many as stages"
        )
    parts = count * data_shards(jax.sharding.get_abstract_mesh()) // size
    if rows % parts:
        raise ValueError(
            f"a batch (or part of `accumulate`) of {rows} rows: expected a multiple of {parts}, "
            f"microbatches={count} times the data shards of --mesh; change batch_size or microbatches"
        )
    return count


def _pipeline(run: Layers, layers: Any, rows: Any, key: jax.Array | None, count: int) -> Any:
    """What one stage does. rows: its share [B / S, ...] of each array -> the same of x and routing."""
    size, stage = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    to_next = [(i, i + 1) for i in range(size - 1)]
    parts = jax.tree.map(lambda a: _gather(a, count), rows)

    def tick(held, number):
        fresh = jax.tree.map(lambda a: a[jnp.minimum(number, count - 1)], parts)
        held = jax.tree.map(lambda new, old: jnp.where(stage == 0, new, old), fresh, held)
        x, positions, segments, routing = held
        own = None if key is None else jax.random.fold_in(key, number - stage + size)
        x, context = run(layers, x, positions, FullContext(segments, own, routing))
        done = (x, positions, segments, context.routing)
        return jax.tree.map(lambda a: jax.lax.ppermute(a, AXIS, to_next), done), (x, context.routing)

    # Stages begin with rows of the batch and not with zeros, so that no tick can make a NaN of its own.
    first = jax.tree.map(lambda a: a[0], parts)
    _, results = jax.lax.scan(tick, first, jnp.arange(count + size - 1))
    return jax.tree.map(lambda a: _deal(a[size - 1 :], stage == size - 1), results)


def _gather(x: jax.Array, count: int) -> jax.Array:
    """[B / S, ...] of each stage -> [M, B / M, ...] on each. Part i of k of a stage has its rows i, i + k,
    ..., so that they stay on their data shard.
    """
    x = jax.lax.all_gather(x, AXIS)
    x = x.reshape(len(x), -1, count // len(x), *x.shape[2:]).swapaxes(1, 2)
    x = x.reshape(count, -1, *x.shape[3:])
    names = ("seq", "embed") if x.ndim == 4 else (None,) * (x.ndim - 2)
    return shard(x, None, "batch", *names)


def _deal(x: jax.Array, here: jax.Array) -> jax.Array:
    """[M, B / M, ...] of the stage that is `here` -> [B / S, ...] of each."""
    size = jax.lax.axis_size(AXIS)
    x = jnp.where(here, x, jnp.zeros_like(x))
    x = jax.lax.psum_scatter(x.reshape(size, -1, *x.shape[1:]), AXIS)
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
