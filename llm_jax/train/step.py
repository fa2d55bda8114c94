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

from llm_jax.kernels.compiler_options import TRAIN, compiler_options
from llm_jax.models import Params, Trainable
from llm_jax.train.bad_loss import RECENT, is_bad
from llm_jax.train.objectives import Batch, Objective
from llm_jax.train.optim import Optimizer, keep, update_average
from llm_jax.train.state import TrainState, state_shardings
from llm_jax.tree import layers_apart

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
        bind = lambda params: bind_all(params, *frozen)  # noqa: E731
        grads, loss, metrics = _gradient(bind, objective, state.params, batch, key, accumulate)
        norm = _norm(grads)
        bad = is_bad(loss, norm, state.losses, spike_factor)
        update = optimizer.transform.update
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its int32 counts with floats
            updates, opt_state = update(grads, state.opt_state, state.params, bad=bad)
            learning_rate = jnp.asarray(optimizer.schedule(state.step), jnp.float32)
        # Selected one after the other, each made from the selected one before it: see `Optimizer`.
        params = keep(bad, state.params, optax.apply_updates(state.params, updates))
        average = state.ema
        if average is not None:
            average = update_average(average, params, state.step, optimizer.ema_decay)
            average = keep(bad, state.ema, average)
        losses = keep(bad, state.losses, state.losses.at[state.step % RECENT].set(loss))
        metrics |= {
            "loss": loss,
            "bad": bad,
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "tokens": jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32),
        }
        return TrainState(state.step + 1, params, opt_state, average, losses), metrics

    bind_all = _binder(model, mesh)
    shardings = state_shardings(model, optimizer, mesh)
    places = {"donate_argnums": 0, "out_shardings": (shardings, None)}
    part, options = jax.jit(step, **places), compiler_options(TRAIN, mesh.devices.flat)
    whole = jax.jit(step, **places, compiler_options=options) if options else part
    return _OnMesh(whole, mesh, part)


@functools.lru_cache(maxsize=8)  # several held-out sets share one program
def make_eval_step(model: Trainable, objective: Objective, mesh: Mesh) -> Callable:
    """f(params, batch, *frozen) -> {name: (sum, count)} with "loss" among the names; no dropout."""

    bind = _binder(model, mesh)

    @jax.jit
    def step(params: Params, batch: Batch, *frozen: Params) -> dict[str, tuple[jax.Array, jax.Array]]:
        loss, count, metrics = objective(bind(params, *frozen), batch, None)
        return {"loss": (loss, count)} | metrics

    return _OnMesh(step, mesh, step)


def _binder(model: Trainable, mesh: Mesh) -> Callable[..., Any]:
    """`model.bind`; with the layers apart where each CPU device has all of them: see `tree.PerLayer`."""
    whole = mesh.size == mesh.shape["data"]
    if not whole or mesh.devices.flat[0].platform != "cpu":
        return model.bind
    return lambda *trees: model.bind(*map(layers_apart, trees))


def _gradient(
    bind: Callable[[Params], Any],
    objective: Objective,
    params: Params,
    batch: Batch,
    key: jax.Array,
    accumulate: int,
) -> tuple[Params, jax.Array, dict[str, jax.Array]]:
    """(gradient of the mean loss, mean loss, mean metrics) of a batch computed in parts."""

    def forward(part, index):
        """(function from the loss sum's cotangent to that of the parameters, the sums of a part)."""

        def loss_sum(params):
            loss, count, metrics = objective(bind(params), part, jax.random.fold_in(key, index))
            return loss, (count, metrics)

        loss, back, (count, metrics) = jax.vjp(loss_sum, params, has_aux=True)
        return back, (loss, count, metrics)

    if accumulate == 1:
        back, (loss, count, metrics) = forward(batch, 0)
        # Divided here, and not in the gradients, which that would read and write once more.
        (grads,) = back(1.0 / _positive(count))
    else:
        parts = jax.tree.map(lambda x: _split_rows(x, accumulate), batch)

        def part_sums(part, index):
            back, sums = forward(part, index)
            return back(jnp.ones_like(sums[0]))[0], sums

        first = jax.eval_shape(part_sums, jax.tree.map(lambda x: x[0], parts), 0)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)

        def add(sums, indexed):
            return jax.tree.map(jnp.add, sums, part_sums(*indexed)), None

        (grads, (loss, count, metrics)), _ = jax.lax.scan(add, zeros, (parts, jnp.arange(accumulate)))
        grads = jax.tree.map(lambda g: g / _positive(count), grads)
    means = {name: s / jnp.maximum(n, 1.0) for name, (s, n) in metrics.items()}
    return grads, loss / _positive(count), means


def _positive(count: jax.Array) -> jax.Array:
    """What to divide by: a batch without any target has the loss and the gradient 0."""
    return jnp.maximum(count, 1e-6)


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
    """A jitted function, called or lowered with `mesh` set, which activation constraints refer to.

    part: the same for a program around it, as only the whole of a program has options of the compiler.
    """

    function: Any
    mesh: Mesh
    part: Any

    def __call__(self, *args):
        with jax.set_mesh(self.mesh):
            return self.function(*args)

    def lower(self, *args):
        """`jax.stages.Lowered`, for compiling ahead of time."""
        with jax.set_mesh(self.mesh):
            return self.function.lower(*args)
