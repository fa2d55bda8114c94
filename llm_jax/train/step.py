"""One optimizer step and one evaluation step, jit-compiled over the mesh.

    batch [B, ...] -> `accumulate` parts -> gradient of each part's loss sum, added up
    -> / total count -> clip, optimizer -> new parameters (and their average)

Parts add up to exactly the large batch because objectives return sums and counts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llm_jax.models import Params, Trainable
from llm_jax.train.bad_loss import RECENT, is_bad
from llm_jax.train.objectives import Batch, Objective
from llm_jax.train.optim import Optimizer, update_average
from llm_jax.train.state import TrainState, state_shardings

TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    model: Trainable,
    objective: Objective,
    optimizer: Optimizer,
    mesh: Mesh,
    *,
    accumulate: int = 1,
    spike_factor: float = 0.0,
) -> TrainStep:
    """f(state, batch, key, *frozen) -> (state, metrics); the state is donated, its shardings are kept.

    batch: leaves [B, ...], B a multiple of `accumulate`. key: one for the whole run; the step's own
    randomness is fold_in(key, state.step), so a resumed run draws what the first would have drawn.
    frozen: what `model.bind` takes besides what is trained, such as the weights under LoRA.
    metrics: float32 scalars loss, grad_norm (before clipping), learning_rate, tokens and the
    objective's own; and bad, bool: after such a step (llm_jax/train/bad_loss.py) the state is the one
    before it, but for the count of steps.
    """

    def step(state: TrainState, batch: Batch, key: jax.Array, *frozen: Params):
        key = jax.random.fold_in(key, state.step)
        bind = lambda params: model.bind(params, *frozen)  # noqa: E731
        grads, loss, metrics = _gradient(bind, objective, state.params, batch, key, accumulate)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its int32 counts with floats
            updates, opt_state = optimizer.transform.update(grads, state.opt_state, state.params)
            learning_rate = jnp.asarray(optimizer.schedule(state.step), jnp.float32)
        params = optax.apply_updates(state.params, updates)
        average = state.ema
        if average is not None:
            average = update_average(average, params, state.step, optimizer.ema_decay)
        norm = _norm(grads)
        bad = is_bad(loss, norm, state.losses, spike_factor)
        losses = state.losses.at[state.step % RECENT].set(loss)
        new = TrainState(state.step, params, opt_state, average, losses)
        new = jax.tree.map(lambda old, new: jnp.where(bad, old, new), state, new)
        metrics |= {
            "loss": loss,
            "bad": bad,
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "tokens": jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32),
        }
        return dataclasses.replace(new, step=state.step + 1), metrics

    shardings = state_shardings(model, optimizer, mesh)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return _OnMesh(compiled, mesh)


@functools.lru_cache(maxsize=8)  # several held-out sets share one program
def make_eval_step(model: Trainable, objective: Objective, mesh: Mesh) -> Callable:
    """f(params, batch, *frozen) -> {name: (sum, count)} with "loss" among the names; no dropout."""

    @jax.jit
    def step(params: Params, batch: Batch, *frozen: Params) -> dict[str, tuple[jax.Array, jax.Array]]:
        loss, count, metrics = objective(model.bind(params, *frozen), batch, None)
        return {"loss": (loss, count)} | metrics

    return _OnMesh(step, mesh)


def _gradient(
    bind: Callable[[Params], Any],
    objective: Objective,
    params: Params,
    batch: Batch,
    key: jax.Array,
    accumulate: int,
) -> tuple[Params, jax.Array, dict[str, jax.Array]]:
    """(gradient of the mean loss, mean loss, mean metrics) of a batch computed in parts."""

    def loss_sum(params, part, key):
        loss, count, metrics = objective(bind(params), part, key)
        return loss, (loss, count, metrics)

    def part_sums(part, index):
        grads, (loss, count, metrics) = jax.grad(loss_sum, has_aux=True)(
            params, part, jax.random.fold_in(key, index)
        )
        return grads, loss, count, metrics

    if accumulate == 1:
        sums = part_sums(batch, 0)
    else:
        parts = jax.tree.map(lambda x: _split_rows(x, accumulate), batch)
        first = jax.eval_shape(part_sums, jax.tree.map(lambda x: x[0], parts), 0)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)

        def add(sums, indexed):
            return jax.tree.map(jnp.add, sums, part_sums(*indexed)), None

        sums, _ = jax.lax.scan(add, zeros, (parts, jnp.arange(accumulate)))
    grads, loss, count, metrics = sums
    count = jnp.maximum(count, 1e-6)  # a batch without any target has the gradient 0
    grads = jax.tree.map(lambda g: g / count, grads)
    return grads, loss / count, {name: s / jnp.maximum(n, 1.0) for name, (s, n) in metrics.items()}


def _norm(tree: Params) -> jax.Array:
    """Euclidean norm of all leaves together."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


def _split_rows(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...]; part i takes rows i, i + parts, ...

    Interleaved, so that each device's rows stay on it when the batch is sharded in blocks.
    """
    return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)


@dataclasses.dataclass(frozen=True)
class _OnMesh:
    """A jitted function, called or lowered with `mesh` set, which activation constraints refer to."""

    function: Any
    mesh: Mesh

    def __call__(self, *args):
        with jax.set_mesh(self.mesh):
            return self.function(*args)

    def lower(self, *args):
        """`jax.stages.Lowered`, for compiling ahead of time."""
        with jax.set_mesh(self.mesh):
            return self.function.lower(*args)
