"""The training loop: data, step, log, evaluate, save.

    batch = loader(step)                     a pure function of the step, made ahead by a thread
    state, metrics = train_step(state, ...)  llm_jax/train/step.py
    every log_every steps                    metrics.jsonl, TensorBoard, terminal
    every eval_every steps                   the held-out part
    every checkpoint_every steps             WORKDIR/checkpoints/<step>/, written in the background

Nothing but the step number ties one step to the next besides the state, so a run that was cut off
goes on from its newest checkpoint exactly as it would have gone on. What may go wrong on the way has
files of its own: checkpoints.py (full disks), preemption.py (signals), bad_loss.py (NaN, spikes).
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.checkpoint.store import Checkpoints
from llm_jax.config import TrainConfig
from llm_jax.data.loader import prefetch, to_device, whole_to_device
from llm_jax.distributed import arrive
from llm_jax.models import Params, Trainable
from llm_jax.train.bad_loss import ADVICE, IN_A_ROW, LAG, BadLoss, take, write_bad
from llm_jax.train.checkpoints import first_about, open_checkpoints, restore_state, save_state, settle
from llm_jax.train.memory import buffers, out_of_memory
from llm_jax.train.metrics_log import MetricsLog, Record
from llm_jax.train.objectives import Objective
from llm_jax.train.optim import Optimizer, make_optimizer
from llm_jax.train.preemption import Preempted, Preemption
from llm_jax.train.speed import Clock, Trace
from llm_jax.train.state import TrainState, abstract_state, init_state, start_state
from llm_jax.train.step import TrainStep, make_eval_step, make_train_step

HostBatch = Mapping[str, np.ndarray]


class Loader(Protocol):
    """Batches as a pure function of their number."""

    @property
    def fingerprint(self) -> Mapping[str, int]:
        """What that function depends on, such as the number of records: see data/loader.py."""
        ...

    def __call__(self, step: int) -> HostBatch:
        """This host's rows of batch `step`, from 0."""
        ...


@dataclasses.dataclass(frozen=True)
class Task:
    """What to train, on what, and what to judge it by."""

    model: Trainable
    objective: Objective
    loader: Loader
    evaluate: Callable[[Params], dict[str, float]]  # {"eval/loss": ..., ...} on the held-out part
    start: Callable[[jax.Array], Params] | None = None  # key -> first parameters; None = random ones
    frozen: tuple[Params, ...] = ()  # what `model.bind` takes besides the parameters that are trained


def fit(
    task: Task,
    config: TrainConfig,
    mesh: Mesh,
    workdir: str | Path,
    *,
    steps: int,
    echo: Callable[[Record], None] | None = None,
) -> TrainState:
    """Train for `steps` steps in all, resuming from the newest whole checkpoint in `workdir`.

    Raises FloatingPointError as `config.on_bad_loss` says, `Preempted` after a SIGTERM or SIGINT,
    OSError when the last checkpoint could not be written, MemoryError when a step does not fit, and
    ValueError for `profile_steps` beyond the last one.
    """
    if config.traced_steps[0] > steps:
        raise ValueError(f"profile_steps={config.profile_steps!r}: expected steps of the run's {steps}")
    workdir, optimizer = Path(workdir), make_optimizer(config.optim, task.model, steps)
    train_step = make_train_step(
        task.model,
        task.objective,
        optimizer,
        mesh,
        accumulate=config.accumulate,
        spike_factor=config.spike_factor,
    )
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    rolled_back: dict[str, int] = {}  # what differs from the checkpoint after a rollback
    while True:
        with (
            Preemption() as preemption,
            Trace(workdir / "profile", *config.traced_steps) as trace,
            open_checkpoints(workdir, config) as checkpoints,
        ):
            if checkpoints.newest is None:
                state = first_state(task, optimizer, mesh, init_key)
                about = first_about(task.loader.fingerprint)
            else:
                like = abstract_state(task.model, optimizer, mesh)
                data = task.loader.fingerprint
                state, about = restore_state(workdir, checkpoints.newest, like, data)
            about |= rolled_back
            with MetricsLog(
                workdir, start=int(state.step), steps=steps, echo=echo, project=config.wandb_project
            ) as log:
                run = _Run(task, config, mesh, workdir, steps, checkpoints, preemption, trace, log)
                try:
                    return _train(run, train_step, state, about, run_key)
                except jax.errors.JaxRuntimeError as error:
                    if "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    length = task.loader(about["position"])["segment_ids"].shape[1]
                    like = abstract_state(task.model, optimizer, mesh)
                    raise out_of_memory(
                        error, buffers(task.model, like, config, mesh, length)
                    ) from error
                except BadLoss as bad:
                    if config.on_bad_loss != "rollback" or about["rollbacks"] == config.max_rollbacks:
                        raise
                    rolled_back = {"position": bad.position + 1, "rollbacks": about["rollbacks"] + 1}


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a run is made of besides the state that it changes."""

    task: Task
    config: TrainConfig
    mesh: Mesh
    workdir: Path
    steps: int
    checkpoints: Checkpoints
    preemption: Preemption
    trace: Trace
    log: MetricsLog


def _train(
    run: _Run, train_step: TrainStep, state: TrainState, about: dict[str, Any], key: jax.Array
) -> TrainState:
    """From `state` to the last step. about: what checkpoints say besides, kept up to date."""
    task, config, steps, log = run.task, run.config, run.steps, run.log
    step, first = int(state.step), about["position"]
    if step and _due(step, config.eval_every, steps) and not log.judged:
        _evaluate(run, step, state)  # a signal broke it off
    pending, in_a_row, clock = collections.deque(), 0, Clock(task.model, run.mesh)
    batches = prefetch(lambda n: to_device(task.loader(n), run.mesh), first, first + steps - step)
    for position, batch in enumerate(clock.waiting(batches), first):
        arrive(f"step {step + 1}")
        run.trace.before(step + 1)
        state, metrics = train_step(state, batch, key, *task.frozen)
        run.preemption.unsaved = True
        if run.mesh.size > 1 and jax.default_backend() == "cpu":
            jax.block_until_ready(state)  # queued collectives of fake devices can deadlock
        step += 1
        run.trace.after(step, state)
        clock.count(metrics["tokens"], batch["segment_ids"].shape[1])
        log.advance()
        run.checkpoints.poll()

        stop = run.preemption.due()
        logging = step % config.log_every == 0 or step == steps
        saving = _due(step, config.checkpoint_every, steps) or stop is not None
        judging = _due(step, config.eval_every, steps) or (saving and config.keep_best > 0)
        pending.append((step, position, metrics))
        for taken in take(pending, leave=0 if logging or saving or judging else LAG):
            in_a_row = in_a_row + 1 if taken[2]["bad"] else 0
            if in_a_row:
                message = write_bad(run.workdir, taken, task.loader)
                about["skipped"] += 1
                if config.on_bad_loss != "skip" or in_a_row == IN_A_ROW:
                    raise BadLoss(f"{message}. {ADVICE}", taken[1])

        if logging:
            counts = {
                "train/skipped_steps": about["skipped"],
                "train/rollbacks": about["rollbacks"],
                "checkpoint/failures": run.checkpoints.failures,
            }
            log.write(step, _numbers(metrics) | clock.rates() | {k: n for k, n in counts.items() if n})
        about |= {"position": position + 1, "metrics": {}}
        if judging and stop is None:
            about["metrics"] = _evaluate(run, step, state)
            stop = run.preemption.requested
            clock.restart()
        if saving or stop is not None:
            arrive(f"the checkpoint of step {step}")
            save_state(run.checkpoints, step, state, about)
        if stop is not None:
            raise Preempted(stop, step, run.checkpoints)
    settle(run.checkpoints)
    if run.preemption.requested is not None:
        raise Preempted(run.preemption.requested, step, run.checkpoints)
    return state


def first_state(task: Task, optimizer: Optimizer, mesh: Mesh, key: jax.Array) -> TrainState:
    """State at step 0: random parameters, or those that the task starts from."""
    if task.start is None:
        return init_state(task.model, optimizer, mesh, key)
    return start_state(task.start(key), task.model, optimizer, mesh)


def make_evaluate(
    model: Trainable,
    objective: Objective,
    batches: Sequence[HostBatch],
    mesh: Mesh,
    frozen: tuple[Params, ...] = (),
) -> Callable[[Params], dict[str, float]]:
    """f(params) -> {"eval/loss": mean, "eval/accuracy": ...} over all targets of the batches."""
    if not batches:
        raise ValueError("there is nothing to evaluate on: batches is empty")
    eval_step = make_eval_step(model, objective, mesh)

    def evaluate(params: Params) -> dict[str, float]:
        on_device = (whole_to_device(dict(batch), mesh) for batch in batches)
        parts = [jax.device_get(eval_step(params, batch, *frozen)) for batch in on_device]
        sums = jax.tree.map(lambda *x: np.sum(x), *parts)
        return {f"eval/{name}": float(total / count) for name, (total, count) in sums.items()}

    return evaluate


def _evaluate(run: _Run, step: int, state: TrainState) -> dict[str, float]:
    """The evaluation, logged; empty when a signal broke it off."""
    numbers = {}
    arrive(f"the evaluation after step {step}")
    with run.preemption.breakable():
        numbers = run.task.evaluate(state.best_params)
    if numbers:
        run.log.write(step, numbers)
    return numbers


def _due(step: int, every: int, steps: int) -> bool:
    return step == steps or (every > 0 and step % every == 0)


def _numbers(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
    """The finite ones: JSON has no other."""
    numbers = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
    hidden = ("tokens", "bad")
    return {f"train/{k}": v for k, v in numbers.items() if k not in hidden and math.isfinite(v)}
