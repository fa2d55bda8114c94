"""The state of training: what a step takes and returns, and what a checkpoint holds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llm_jax.models import Model, Params, init_params
from llm_jax.sharding import replicated
from llm_jax.train.optim import Optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes from step to step."""

    step: jax.Array  # [] int32, updates done
    params: Params  # float32, the master copy
    opt_state: Any
    ema: Params | None  # moving average of params, where the optimizer keeps one

    @property
    def best_params(self) -> Params:
        """What to evaluate and to use after training: the average where there is one."""
        return self.params if self.ema is None else self.ema


def init_state(model: Model, optimizer: Optimizer, mesh: Mesh, key: jax.Array) -> TrainState:
    """State at step 0 with random parameters, born on its shards: no device ever holds the whole."""
    return start_state(init_params(model, mesh, key), model, optimizer, mesh)


def start_state(params: Params, model: Model, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """State at step 0 of training that starts from these parameters (sharded over `mesh`)."""

    def make(params):
        average = jax.tree.map(jnp.copy, params) if optimizer.ema_decay else None
        return optimizer.transform.init(params), average

    target = state_shardings(model, optimizer, mesh)
    opt_state, average = jax.jit(make, out_shardings=(target.opt_state, target.ema))(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh))
    return TrainState(step, params, opt_state, average)


def abstract_state(model: Model, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, with nothing allocated: what a restore fills."""
    average = model.shapes if optimizer.ema_decay else None
    opt_state = jax.eval_shape(optimizer.transform.init, model.shapes)
    shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), model.shapes, opt_state, average)
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        state_shardings(model, optimizer, mesh),
    )


def state_shardings(model: Model, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """NamedSharding of every leaf; the moments of a parameter lie where the parameter lies."""
    params, whole = model.shardings(mesh), replicated(mesh)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer.transform,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.transform.init, model.shapes),
        params,
        transform_non_params=lambda _: whole,
    )
    return TrainState(whole, params, opt_state, params if optimizer.ema_decay else None)
