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
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.ops.attention import FullContext
from llm_jax.sharding import data_shards, on_shards, on_stages, shard, stages

AXIS = "stage"
AXES = {  # of what a microbatch has, all of which passes from stage to stage
    "x": ("batch", "seq", "embed"),
    "positions": ("batch", "seq"),
    "segment_ids": ("batch", "seq"),
    "routing": ("batch", None),
}
Rows = dict[str, Any]  # by those names
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
    segments, routing = context.segment_ids, context.routing
    rows = {"x": x, "positions": positions, "segment_ids": segments, "routing": routing}

    def on_stage(layers, rows, key):
        return _pipeline(run, layers, rows, key, count)

    done = on_stages(on_stage, (True, True, False))(layers, rows, context.dropout_key)
    context = dataclasses.replace(context, routing=done["routing"])
    return shard(done["x"], *AXES["x"]), context


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


def _pipeline(run: Layers, layers: Any, rows: Rows, key: jax.Array | None, count: int) -> Rows:
    """What one stage does. rows: its share [B / S, ...] of each -> the same of x and routing."""
    size, stage = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    to_next = [(i, i + 1) for i in range(size - 1)]
    parts = _on_rows(functools.partial(_gather, count), jax.tree.map(lambda a: a[None], rows))

    def tick(held, number):
        fresh = jax.tree.map(lambda a: a[jnp.minimum(number, count - 1)], parts)
        held = jax.tree.map(lambda new, old: jnp.where(stage == 0, new, old), fresh, held)
        own = None if key is None else jax.random.fold_in(key, number - stage + size)
        context = FullContext(held["segment_ids"], own, held["routing"])
        x, context = run(layers, held["x"], held["positions"], context)
        done = {"x": x, "routing": context.routing}
        return jax.tree.map(lambda a: jax.lax.ppermute(a, AXIS, to_next), held | done), done

    # Stages begin with rows of the batch and not with zeros, so that no tick can make a NaN of its own.
    first = jax.tree.map(lambda a: a[0], parts)
    _, done = jax.lax.scan(tick, first, jnp.arange(count + size - 1))
    last = jax.tree.map(lambda a: jnp.where(stage == size - 1, a[size - 1 :], 0), done)
    return jax.tree.map(lambda a: a[0], _on_rows(_deal, last))


def _on_rows(move: Callable[[jax.Array], jax.Array], rows: Rows) -> Rows:
    """`move` of each array [?, rows, ...], on each device's own rows of it.

    By hand, because XLA would first gather all rows over the data axes.
    """

    def moved(axes, x):
        return on_shards(lambda x: (move(x),), [(None, *axes)], out_like=(0,))(x)[0]

    return {name: jax.tree.map(functools.partial(moved, AXES[name]), x) for name, x in rows.items()}


def _gather(count: int, x: jax.Array) -> jax.Array:
    """[1, rows, ...] of each stage -> [M, rows S / M, ...] on each."""
    x = jax.lax.all_gather(x[0], AXIS, tiled=True)
    return x.reshape(count, -1, *x.shape[1:])


def _deal(x: jax.Array) -> jax.Array:
    """[M, rows S / M, ...], zeros on all stages but one -> [1, rows, ...] of each."""
    x = x.reshape(-1, *x.shape[2:])
    return jax.lax.psum_scatter(x, AXIS, tiled=True)[None]
