"""The optimizer from its config: a rule by name, decay where it belongs, a schedule, and clipping."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llm_jax.config import OptimConfig
from llm_jax.models import Params, Trainable
from llm_jax.sharding import is_axes

ADAMW_RMS = 0.2  # of an update of AdamW; Muon's are given the same (Liu et al. 2025, arXiv:2502.16982)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The update rule, the learning rate of each step, and the decay of the averaged parameters.

    transform.update(gradients, state, params, bad=...): where `bad` [] is true, the state is returned as
    it was. Each part of the rule sees to that where it makes its new state, and goes on from what was
    selected: a selection from all of it afterwards makes XLA:CPU copy every moment first (measured for
    AdamW on 12.6M parameters: 104 ms instead of 28 ms).
    """

    transform: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule  # step -> learning rate
    ema_decay: float  # 0 = no average is kept


def make_optimizer(config: OptimConfig, model: Trainable, steps: int) -> Optimizer:
    """The configured optimizer for a run of `steps` updates of this model's parameters.

    Every rule gives a direction; decay is added to it afterwards (decoupled), and both are scaled by the
    learning rate. Raises ValueError for Muon where the model has no stacked matrices.
    """
    schedule = make_schedule(config, steps)
    parts = [
        _RULES[config.optimizer](config, model),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(model)),
        unless_bad(optax.scale_by_learning_rate(schedule)),
    ]
    if config.clip_norm:
        parts.insert(0, optax.stateless(functools.partial(_clip, config.clip_norm)))
    return Optimizer(optax.chain(*parts), schedule, config.ema_decay)


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warmup from 0, then the named decay, which ends at step `steps`.

    wsd (warmup, stable, decay): Hu et al. 2024, arXiv:2404.06395, with a linear decay.
    """
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = round(config.warmup_fraction * steps)
    rest = max(steps - warmup, 1)
    decay = max(min(round(config.decay_fraction * steps), rest), 1)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction),
        "linear": optax.linear_schedule(peak, end, rest),
        "constant": optax.constant_schedule(peak),
        "wsd": optax.linear_schedule(peak, end, decay, transition_begin=rest - decay),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def decay_mask(model: Trainable) -> Any:
    """Tree of bool: True for the weights of products and the embedding tables.

    Judged by the declared axes, because the rank of a stacked leaf says nothing: a bias of the
    query heads is [L, N, H], a norm's scale [L, D].
    """

    def decays(axes: tuple[str, ...], contract: tuple[str, ...]) -> bool:
        logical = [a for a in axes if a != "layers"]
        return bool(contract) or (len(logical) == 2 and logical[-1] == "embed")

    return jax.tree.map(decays, model.axes, model.contract, is_leaf=is_axes)


def keep(bad: jax.Array | bool, old: Any, new: Any) -> Any:
    """`old` where `bad` [] is true, else `new`: two trees of arrays."""
    return jax.tree.map(lambda old, new: jnp.where(bad, old, new), old, new)


def unless_bad(rule: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The same rule, whose state stays as it was where `bad`; see `Optimizer`."""

    def update(updates: Any, state: Any, params: Any = None, *, bad: jax.Array | bool = False, **_):
        updates, new = rule.update(updates, state, params)
        return updates, keep(bad, state, new)

    return optax.GradientTransformationExtraArgs(rule.init, update)


def update_average(average: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """Exponential moving average of the parameters; `step` [] counts the updates before this one.

    The decay grows as (1 + step) / (10 + step) up to `decay`, so that the start is soon forgotten.
    """
    done = step.astype(jnp.float32)
    rate = jnp.minimum(decay, (1.0 + done) / (10.0 + done))
    return jax.tree.map(lambda a, p: a + (1.0 - rate) * (p - a), average, params)


def _clip(limit: float, updates: Params, _: Params | None) -> Params:
    """Scaled down to the global norm `limit` where it is larger; one factor, so nothing is written."""
    factor = limit / jnp.maximum(optax.tree.norm(updates), limit)
    return jax.tree.map(lambda u: u * factor, updates)


def _adam(config: OptimConfig, _: Trainable) -> optax.GradientTransformationExtraArgs:
    """Adam (Kingma & Ba 2015) in the order that `Optimizer` asks for; the state is optax's."""

    def update(updates: Params, state: Any, _: Any = None, *, bad: jax.Array | bool = False, **__):
        mu = optax.tree.update_moment(updates, state.mu, config.b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, config.b2, 2)
        new = keep(bad, state, optax.ScaleByAdamState(state.count + 1, mu, nu))
        mean = optax.tree.bias_correction(new.mu, config.b1, new.count)
        square = optax.tree.bias_correction(new.nu, config.b2, new.count)
        return jax.tree.map(lambda m, s: m / (jnp.sqrt(s) + config.eps), mean, square), new

    init = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps).init
    return optax.GradientTransformationExtraArgs(init, update)


def _lion(config: OptimConfig, _: Trainable) -> optax.GradientTransformationExtraArgs:
    return unless_bad(optax.scale_by_lion(b1=config.b1, b2=config.b2))


def _sgd(config: OptimConfig, _: Trainable) -> optax.GradientTransformationExtraArgs:
    return unless_bad(optax.trace(decay=config.momentum))


def _muon(config: OptimConfig, model: Trainable) -> optax.GradientTransformationExtraArgs:
    """Orthogonalized momentum for the matrices of the layers, each on its own; Adam for all else.

    A matrix is what the declared axes say: wq, an array [L, N, H, D], is L matrices [N H, D]; weights of
    experts [L, E, out, in] are L E matrices.
    """

    def label(axes: tuple[str, ...], contract: tuple[str, ...]) -> str:
        return "matrices" if "layers" in axes and contract else "others"

    labels = jax.tree.map(label, model.axes, model.contract, is_leaf=is_axes)
    if "matrices" not in jax.tree.leaves(labels):
        raise ValueError("optim.optimizer='muon': expected a model with stacked layers; use 'adamw'")

    def numbers(axes: tuple[str, ...], contract: tuple[str, ...], label: str) -> Any:
        if label != "matrices":
            return optax.MaskedNode()
        first = len(axes) - len(contract)  # weights are "out, in"
        out = tuple(range(_lead(axes), first))
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, len(axes))), out)

    sides = jax.tree.map(numbers, model.axes, model.contract, labels, is_leaf=is_axes)

    def match_adamw(updates: Params, _: Params | None) -> Params:
        def scaled(u, dims):
            width, height = (math.prod(u.shape[i] for i in axes) for axes in dims)
            return u * (ADAMW_RMS * max(width, height) ** 0.5)

        return jax.tree.map(scaled, updates, sides)

    muon = optax.chain(
        unless_bad(optax.contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=sides)),
        optax.stateless(match_adamw),
    )
    return optax.partition({"matrices": muon, "others": _adam(config, model)}, labels)


def _lead(axes: tuple[str, ...]) -> int:
    """How many axes come before those of a matrix: of layers, and of experts."""
    return axes.count("layers") + axes.count("experts")


def _adafactor(_: OptimConfig, model: Trainable) -> optax.GradientTransformationExtraArgs:
    """Second moments by row and column, updates clipped and relative to the size of their parameter.

    As in the paper for each matrix of each layer, which a stack of weights with several axes hides: a
    leaf becomes [L, out, in] or a vector [L, n] first, and the rule is applied to each layer. Of experts
    it is [L E, out, in].
    """
    rule = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=1),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )
    each_layer = optax.GradientTransformation(jax.vmap(rule.init), jax.vmap(rule.update))

    def label(axes: tuple[str, ...]) -> str:
        return next((name for name in ("experts", "layers") if name in axes), "others")

    labels = jax.tree.map(label, model.axes, is_leaf=is_axes)
    rules = {"experts": each_layer, "layers": each_layer, "others": rule}
    parts = optax.partition({name: rules[name] for name in set(jax.tree.leaves(labels))}, labels)

    def matrix(
        x: jax.Array, axes: tuple[str, ...], contract: tuple[str, ...], decays: bool
    ) -> jax.Array:
        lead = (math.prod(x.shape[: _lead(axes)]),) if "layers" in axes else ()
        inner = math.prod(x.shape[x.ndim - max(len(contract), 1) :])
        return x.reshape(*lead, -1, inner) if decays else x.reshape(*lead, -1)

    def matrices(tree: Params) -> Params:
        return jax.tree.map(matrix, tree, model.axes, model.contract, decay_mask(model))

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        assert params is not None
        changes, state = parts.update(matrices(updates), state, matrices(params))
        return jax.tree.map(lambda u, p: u.reshape(p.shape), changes, params), state

    return unless_bad(optax.GradientTransformation(lambda params: parts.init(matrices(params)), update))


_RULES = {"adamw": _adam, "adafactor": _adafactor, "lion": _lion, "muon": _muon, "sgd": _sgd}
