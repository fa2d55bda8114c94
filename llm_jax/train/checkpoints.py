"""The state of a run on disk: what its checkpoints hold, and how it goes on from one.

A checkpoint of step n holds the parameters, their average, the optimizer's state and n as arrays, and in
its manifest the position in the data, what the data was, and how the evaluation judged the step. That
is all: the randomness of a step is fold_in(key of the run, n), and that key comes from the seed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from llm_jax.checkpoint import store
from llm_jax.config import TrainConfig
from llm_jax.train.state import TrainState


def open_checkpoints(workdir: Path, config: TrainConfig) -> store.Checkpoints:
    """The checkpoints of the run in `workdir`; those that stay are chosen by the config."""
    return store.open_checkpoints(
        workdir / "checkpoints",
        keep=config.keep,
        keep_best=config.keep_best,
        best_metric=config.best_metric,
        keep_every=config.keep_every,
    )


def save_state(
    checkpoints: store.Checkpoints, step: int, state: TrainState, about: Mapping[str, Any]
) -> None:
    """Write the state after `step` in the background.

    about: position (batches drawn so far), data (fingerprint of the loader), metrics (of the
    evaluation at this step; empty where there was none), skipped (bad steps), rollbacks.
    """
    checkpoints.save(step, _items(state), about)


def first_about(data: Mapping[str, int]) -> dict[str, Any]:
    """What a checkpoint of step 0 would say besides the state."""
    return {"position": 0, "data": dict(data), "metrics": {}, "skipped": 0, "rollbacks": 0}


def restore_state(
    workdir: Path, step: int, like: TrainState, data: Mapping[str, int]
) -> tuple[TrainState, dict[str, Any]]:
    """(state, about) of a step, as saved. ValueError when its batches would not go on with this data."""
    about = store.read_about(workdir / "checkpoints", step)
    found = about["data"]
    changed = [
        f"{name}: {found.get(name)} there, {data.get(name)} here"
        for name in sorted(found.keys() | data.keys())
        if found.get(name) != data.get(name)
    ]
    if changed:
        raise ValueError(
            f"{workdir / 'checkpoints' / str(step)} was trained on other batches: {'; '.join(changed)}. "
            "Take the same data and settings to resume it, or another workdir."
        )
    items = store.restore(workdir / "checkpoints", _items(like), step)
    rest = items["train"]
    state = TrainState(params=items["params"], ema=items.get("ema"), **rest)
    return state, about


def settle(checkpoints: store.Checkpoints) -> None:
    """Wait for the last save; OSError when it failed, a warning when earlier ones did."""
    checkpoints.wait()
    if checkpoints.lost:
        raise OSError(f"the run is not saved: {checkpoints.lost}")
    if checkpoints.failures:
        logging.warning("%d checkpoints could not be written; the last one was", checkpoints.failures)


def _items(state: TrainState) -> Mapping[str, object]:
    """The state as the items of a checkpoint."""
    rest = {"step": state.step, "opt_state": state.opt_state, "losses": state.losses}
    average = {} if state.ema is None else {"ema": state.ema}
    return {"params": state.params, "train": rest} | average
