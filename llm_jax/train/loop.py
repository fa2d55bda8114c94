"""The training loop: data, step, log, evaluate, save.

    batch = loader(step)                     a pure function of the step, made ahead by a thread
    state, metrics = train_step(state, ...)  llm_jax/train/step.py
    every log_every steps                    metrics.jsonl, TensorBoard, terminal
    every eval_every steps                   the held-out part
    every save_every steps                   WORKDIR/checkpoints/<step>/, written in the background

Nothing but the step number ties one step to the next besides the state, so a run that was cut off
goes on from its newest checkpoint exactly as it would have gone on.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.checkpoint import store
from llm_jax.config import OptimConfig, TrainConfig
from llm_jax.data.loader import prefetch, to_device
from llm_jax.models import Model, Params
from llm_jax.train.metrics_log import MetricsLog, Record
from llm_jax.train.objectives import Objective
from llm_jax.train.optim import make_optimizer
from llm_jax.train.state import TrainState, abstract_state, init_state
from llm_jax.train.step import make_eval_step, make_train_step

HostBatch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Task:
    """What to train, on what, and what to judge it by."""

    model: Model
    objective: Objective
    loader: Callable[[int], HostBatch]  # step, from 0 -> this host's rows
    evaluate: Callable[[Params], dict[str, float]]  # {"eval/loss": ..., ...} on the held-out part


def fit(
    task: Task,
    train: TrainConfig,
    optim: OptimConfig,
    mesh: Mesh,
    workdir: str | Path,
    *,
    steps: int,
    echo: Callable[[Record], None] | None = None,
) -> TrainState:
    """Train for `steps` steps in all, resuming from the newest checkpoint in `workdir`.

    Raises FloatingPointError when the loss is no longer finite.
    """
    workdir = Path(workdir)
    optimizer = make_optimizer(optim, task.model, steps)
    train_step = make_train_step(
        task.model, task.objective, optimizer, mesh, accumulate=train.accumulate
    )
    init_key, run_key = jax.random.split(jax.random.key(train.seed))

    if store.latest_step(workdir / "checkpoints") is None:
        state = init_state(task.model, optimizer, mesh, init_key)
    else:
        state = _restore(workdir, abstract_state(task.model, optimizer, mesh))
    start = int(state.step)

    with (
        store.open_checkpoints(workdir / "checkpoints", keep=train.keep) as checkpoints,
        MetricsLog(workdir, start=start, steps=steps, echo=echo) as log,
    ):
        batches = prefetch(lambda step: to_device(task.loader(step), mesh), start, steps)
        clock = _Clock()
        for step, batch in enumerate(batches, start + 1):
            state, metrics = train_step(state, batch, run_key)
            if mesh.size > 1 and jax.default_backend() == "cpu":
                jax.block_until_ready(state)  # queued collectives of fake devices can deadlock
            clock.count(metrics["tokens"])
            log.advance()
            if step % train.log_every == 0 or step == steps:
                log.write(step, _numbers(step, metrics) | clock.rates())
            if _due(step, train.eval_every, steps):
                log.write(step, task.evaluate(state.best_params))
                clock = _Clock()
            if _due(step, train.save_every, steps):
                store.save(checkpoints, step, _items(state))
    return state


def make_evaluate(
    model: Model, objective: Objective, batches: Sequence[HostBatch], mesh: Mesh
) -> Callable[[Params], dict[str, float]]:
    """f(params) -> {"eval/loss": mean, "eval/accuracy": ...} over all targets of the batches."""
    if not batches:
        raise ValueError("there is nothing to evaluate on: batches is empty")
    eval_step = make_eval_step(model, objective, mesh)

    def evaluate(params: Params) -> dict[str, float]:
        parts = [jax.device_get(eval_step(params, to_device(dict(b), mesh))) for b in batches]
        sums = jax.tree.map(lambda *x: np.sum(x), *parts)
        return {f"eval/{name}": float(total / count) for name, (total, count) in sums.items()}

    return evaluate


def _due(step: int, every: int, steps: int) -> bool:
    return step == steps or (every > 0 and step % every == 0)


def _numbers(step: int, metrics: Mapping[str, jax.Array]) -> dict[str, float]:
    numbers = {f"train/{k}": float(v) for k, v in jax.device_get(dict(metrics)).items() if k != "tokens"}
    if not math.isfinite(numbers["train/loss"]):
        raise FloatingPointError(
            f"the loss is {numbers['train/loss']} at step {step}; lower optim.learning_rate, lengthen "
            "the warmup or set optim.clip_norm, then resume from the checkpoint before"
        )
    return numbers


def _items(state: TrainState) -> Mapping[str, object]:
    """The state as the items of a checkpoint."""
    rest = {"step": state.step, "opt_state": state.opt_state}
    average = {} if state.ema is None else {"ema": state.ema}
    return {"params": state.params, "train": rest} | average


def _restore(workdir: Path, like: TrainState) -> TrainState:
    items = store.restore(workdir / "checkpoints", _items(like))
    rest = items["train"]
    return TrainState(rest["step"], items["params"], rest["opt_state"], items.get("ema"))


class _Clock:
    """Tokens and steps per second since the last reading; the first step (compilation) is left out."""

    def __init__(self):
        self._tokens: list[jax.Array] | None = None
        self._since = 0.0

    def count(self, tokens: jax.Array) -> None:
        if self._tokens is None:
            jax.block_until_ready(tokens)
            self._tokens, self._since = [], time.perf_counter()
        else:
            self._tokens.append(tokens)

    def rates(self) -> dict[str, float]:
        """Waits for the steps counted so far."""
        tokens = float(np.sum(jax.device_get(self._tokens))) if self._tokens else 0.0
        steps, seconds = len(self._tokens or ()), time.perf_counter() - self._since
        self._tokens, self._since = [], time.perf_counter()
        if not steps:
            return {}
        return {"perf/tokens_per_s": tokens / seconds, "perf/steps_per_s": steps / seconds}
