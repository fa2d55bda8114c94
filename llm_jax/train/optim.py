"""The optimizer from its config: AdamW with a schedule, decay where it belongs, and clipping."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llm_jax.config import OptimConfig
from llm_jax.models import Model, Params


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The update rule, the learning rate of each step, and the decay of the averaged parameters."""

    transform: optax.GradientTransformation
    schedule: optax.Schedule  # step -> learning rate
    ema_decay: float  # 0 = no average is kept


def make_optimizer(config: OptimConfig, model: Model, steps: int) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019) for a run of `steps` updates of this model's parameters."""
    schedule = make_schedule(config, steps)
    parts = [
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(model)),
        optax.scale_by_learning_rate(schedule),
    ]
    if config.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    return Optimizer(optax.chain(*parts), schedule, config.ema_decay)


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warmup from 0, then the named decay, which ends at step `steps`."""
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = round(config.warmup_fraction * steps)
    rest = max(steps - warmup, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction),
        "linear": optax.linear_schedule(peak, end, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def decay_mask(model: Model) -> Any:
    """Tree of bool: True for the weights of products and the embedding tables.

    Judged by the declared axes, because the rank of a stacked leaf says nothing: a bias of the
    query heads is [L, N, H], a norm's scale [L, D].
    """

    def decays(axes: tuple[str, ...], contract: tuple[str, ...]) -> bool:
        logical = [a for a in axes if a != "layers"]
        return bool(contract) or (len(logical) == 2 and logical[-1] == "embed")

    is_axes = lambda a: isinstance(a, tuple)  # noqa: E731
    return jax.tree.map(decays, model.axes, model.contract, is_leaf=is_axes)


def update_average(average: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """Exponential moving average of the parameters; `step` [] counts the updates before this one.

    The decay grows as (1 + step) / (10 + step) up to `decay`, so that the start is soon forgotten.
    """
    done = step.astype(jnp.float32)
    rate = jnp.minimum(decay, (1.0 + done) / (10.0 + done))
    return jax.tree.map(lambda a, p: a + (1.0 - rate) * (p - a), average, params)
