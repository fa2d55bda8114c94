"""The state of training: what a step takes and returns, and what a checkpoint holds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax.models import Model, Params, Trainable, init_params
from llm_jax.sharding import put_whole, replicated
from llm_jax.train.bad_loss import RECENT
from llm_jax.train.optim import Optimizer
from llm_jax.tree import flatten, path_string


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes from step to step."""

    step: jax.Array  # [] int32, updates done
    params: Params  # float32, the master copy
    opt_state: Any
    ema: Params | None  # moving average of params, where the optimizer keeps one
    losses: jax.Array  # [RECENT] float32, of the newest good steps; NaN where there is none yet

    @property
    def best_params(self) -> Params:
        """What to evaluate and to use after training: the average where there is one."""
        return self.params if self.ema is None else self.ema


def init_state(model: Model, optimizer: Optimizer, mesh: Mesh, key: jax.Array) -> TrainState:
    """State at step 0 with random parameters, born on its shards: no device ever holds the whole."""
    return start_state(init_params(model, mesh, key), model, optimizer, mesh)


def start_state(params: Params, model: Trainable, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """State at step 0 of training that starts from these parameters (sharded over `mesh`)."""

    def make(params):
        average = jax.tree.map(jnp.copy, params) if optimizer.ema_decay else None
        return optimizer.transform.init(params), average

    target = state_shardings(model, optimizer, mesh)
    opt_state, average = jax.jit(make, out_shardings=(target.opt_state, target.ema))(params)
    step = put_whole(np.zeros((), np.int32), mesh)
    losses = put_whole(np.full(RECENT, np.nan, np.float32), mesh)
    return TrainState(step, params, opt_state, average, losses)


def abstract_state(model: Trainable, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, with nothing allocated: what a restore fills."""
    average = model.shapes if optimizer.ema_decay else None
    opt_state = jax.eval_shape(optimizer.transform.init, model.shapes)
    step, losses = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((RECENT,), jnp.float32)
    shapes = TrainState(step, model.shapes, opt_state, average, losses)
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        state_shardings(model, optimizer, mesh),
    )


def state_shardings(model: Trainable, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """NamedSharding of every leaf; the moments of a parameter lie where the parameter lies."""
    params, whole = model.shardings(mesh), replicated(mesh)
    shapes, places = flatten(model.shapes), flatten(params)

    def place(path, moment):
        """That of the parameter whose path ends this one; factored moments are small and stay whole."""
        name = "/" + path_string(path)
        names = [p for p in places if name.endswith("/" + p) and shapes[p].shape == moment.shape]
        return places[max(names, key=len)] if names else whole

    opt_state = jax.tree_util.tree_map_with_path(
        place, jax.eval_shape(optimizer.transform.init, model.shapes)
    )
    return TrainState(whole, params, opt_state, params if optimizer.ema_decay else None, whole)
