"""The steps that are quoted, as programs to compile: those that the engine and training run.

Each function gives a `Case` for the devices of a slice; `tpu.compile` calls it in the process that
compiles. Memory that arrays take is computed from their shapes alone, with no devices (`arrays`).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from llm_jax.cache.paged import PagedCache, abstract_paged, pool_windows
from llm_jax.compress.quantize import quantized_shapes
from llm_jax.config import EngineConfig, OptimConfig
from llm_jax.engine.programs import Buckets
from llm_jax.infer.paged_steps import StepShape, init_slots, make_paged_forward, make_paged_sample
from llm_jax.kernels.compiler_options import SERVE, TRAIN, compiler_options
from llm_jax.models import Model, Params, describe
from llm_jax.models.key_heads import served
from llm_jax.ops.sampling import GREEDY
from llm_jax.plan.workload import CACHES, Workload, device_kind, devices
from llm_jax.sharding import (
    MESH_AXES,
    abstract_device,
    batch_sharding,
    data_shards,
    make_mesh,
    mesh_sizes,
    placed,
    replicated,
)
from llm_jax.tpu.case import Case
from llm_jax.train.objectives import lm_loss
from llm_jax.train.optim import Optimizer, make_optimizer
from llm_jax.train.state import TrainState, abstract_state
from llm_jax.train.step import make_train_step

TRAIN_STEPS = 1000  # of the schedule; the program is the same for any


def abstract_mesh(mesh: str | Mapping[str, int], count: int, kind: str = "") -> AbstractMesh:
    """The mesh of "data:2,tensor:-1" on so many devices that are not there; see `mesh_sizes`.

    kind: of the devices, as JAX names it; caches have another shape on a TPU.
    """
    sizes = mesh_sizes(mesh, count)
    device = abstract_device(kind, None, "tpu") if kind else None
    types = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(tuple(sizes.values()), MESH_AXES, axis_types=types, abstract_device=device)


def mesh_on(topology: str, mesh: str) -> AbstractMesh:
    """The mesh of a slice's devices."""
    return abstract_mesh(mesh, devices(topology), device_kind(topology))


def serving_arrays(work: Workload, mesh: Any) -> tuple[Model, Params, PagedCache]:
    """(model as it is served, abstract weights, abstract cache) on a mesh, abstract or not."""
    model = served(describe(work.config), mesh)
    if work.scheme:
        params = quantized_shapes(model, mesh, work.scheme)
    else:
        params = placed(model.shapes, model.axes, mesh)
    pools = len(pool_windows(work.config))
    pages = (work.rows(data_shards(mesh)) * work.pages,) * pools
    cache = abstract_paged(model.config, pages, work.page_size, mesh, CACHES[work.cache])
    return model, params, cache


def training_arrays(work: Workload, mesh: Any) -> tuple[Model, Optimizer, TrainState]:
    """(model, optimizer, abstract state) on a mesh, abstract or not."""
    of_training = {"remat": work.remat, "microbatches": work.microbatches}
    config = dataclasses.replace(work.config, param_dtype="float32", **of_training)
    model = describe(config)
    optimizer = make_optimizer(
        OptimConfig(learning_rate=1e-3, optimizer=work.optimizer), model, TRAIN_STEPS
    )
    return model, optimizer, abstract_state(model, optimizer, mesh)


def device_bytes(tree: Any) -> int:
    """Bytes of abstract arrays on the device that has most of them."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
    )


def decode(devices: list[Any], workload: dict[str, Any], mesh: str) -> Case:
    """A token for every sequence: the engine's step without prompts."""
    work, on = Workload(**workload), make_mesh(mesh, devices)
    return _forward(work, on, _buckets(work, on).shape(work.rows(data_shards(on)), 0))


def prefill(devices: list[Any], workload: dict[str, Any], mesh: str) -> Case:
    """`prefill_tokens` of prompts: the engine's step with chunks and no single tokens."""
    work, on = Workload(**workload), make_mesh(mesh, devices)
    rows = work.rows(data_shards(on))
    chunk = min(work.prefill_tokens, rows * work.context)
    return _forward(work, on, _buckets(work, on).shape(rows, chunk))


def choose(devices: list[Any], workload: dict[str, Any], mesh: str) -> Case:
    """The next token of every sequence from its logits, greedily."""
    work, on = Workload(**workload), make_mesh(mesh, devices)
    shards = data_shards(on)
    rows = work.rows(shards)
    slots = jax.eval_shape(lambda: init_slots(rows, work.config, on))
    slots = jax.tree.map(lambda x: _rows(x.shape, x.dtype, on), slots)
    logits = _rows((shards, rows, work.config.vocab_size), jnp.float32, on)
    args = (logits, slots, _rows((shards, 2, rows), jnp.int32, on))
    return _served(on, make_paged_sample(GREEDY), args)


def train(devices: list[Any], workload: dict[str, Any], mesh: str) -> Case:
    """An update of all parameters by `batch` rows of `context` tokens."""
    work, on = Workload(**workload), make_mesh(mesh, devices)
    model, optimizer, state = training_arrays(work, on)
    names = ("tokens", "targets", "segment_ids", "positions")
    batch = {name: _rows((work.batch, work.context), jnp.int32, on) for name in names}
    key = jax.eval_shape(lambda: jax.random.key(0)).update(sharding=replicated(on))
    step = make_train_step(model, lm_loss, optimizer, on)
    options = compiler_options(TRAIN, on.devices.flat)
    return Case(_within(on, step.part, 0), (state, batch, key), options=options)


def _buckets(work: Workload, mesh: Mesh) -> Buckets:
    """The sizes that an engine for the workload has programs for."""
    rows = work.rows(data_shards(mesh))
    config = EngineConfig(max_rows=rows, token_budget=work.prefill_tokens, page_size=work.page_size)
    alignment = Buckets.row_alignment(mesh.devices.flat[0].device_kind, work.config)
    return Buckets.of(config, work.pages, len(pool_windows(work.config)), alignment)


def _forward(work: Workload, mesh: Mesh, shape: StepShape) -> Case:
    model, params, cache = serving_arrays(work, mesh)
    shards = data_shards(mesh)
    newest = _rows((shards, shape.rows, 1), jnp.int32, mesh)
    packed = _rows(shape.empty(shards)[0].shape, jnp.int32, mesh)
    args = (params, cache, newest, packed)
    return _served(mesh, make_paged_forward(model, shape), args)


def _served(mesh: Mesh, function: Callable, args: tuple) -> Case:
    """A step of the engine, as `infer.generate.Compiled` compiles it."""
    options = compiler_options(SERVE, mesh.devices.flat)
    return Case(_within(mesh, function, 1), args, options=options)


def _within(mesh: Mesh, function: Callable, donated: int) -> Callable:
    """A jitted function, lowered with the mesh set, as those who call it do."""

    def run(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return jax.jit(run, donate_argnums=donated)


def _rows(shape: tuple[int, ...], dtype: Any, mesh: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=batch_sharding(mesh, shape))
