"""Saving and restoring trees of arrays with Orbax: asynchronous, atomic, onto any mesh.

    checkpoints/<step>/params/   the parameters
                       ema/      their moving average, if the run keeps one
                       train/    the rest of the training state

The parameters are an item of their own, so that inference reads them and nothing else. A step
directory gets its final name only when all its bytes are written: what has a number is whole.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from llm_jax.models import Model, Params
from llm_jax.tree import flatten

ITEMS = ("params", "ema", "train")


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, newest `keep` of them; a context manager that waits for writes."""

    manager: ocp.CheckpointManager

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.manager.close()


def open_checkpoints(directory: str | Path, *, keep: int) -> Checkpoints:
    """The checkpoints in `directory` (made if need be), to save into; all but `keep` are deleted."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
    )
    path = Path(directory).absolute()
    path.mkdir(parents=True, exist_ok=True)
    return Checkpoints(ocp.CheckpointManager(path, options=options, item_names=ITEMS))


def save(checkpoints: Checkpoints, step: int, items: Mapping[str, Any]) -> None:
    """Write `items` (trees by name, of `ITEMS`) as step `step`, in the background.

    The arrays are copied to the host before this returns, so they may be donated afterwards.
    """
    if unknown := set(items) - set(ITEMS):
        raise ValueError(f"items {sorted(unknown)}: a checkpoint holds {ITEMS}")
    arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    checkpoints.manager.save(step, args=ocp.args.Composite(**arguments), force=True)


def latest_step(directory: str | Path) -> int | None:
    """The newest step that is wholly written under `directory`, or None."""
    path = Path(directory)
    steps = [int(p.name) for p in path.iterdir() if p.name.isdigit()] if path.is_dir() else []
    return max(steps, default=None)


def restore(directory: str | Path, like: Mapping[str, Any], step: int | None = None) -> dict[str, Any]:
    """The items named in `like`, of the newest step or of `step`.

    like: trees of ShapeDtypeStruct with shardings, by item name. They say where each array goes, so
    a checkpoint of one mesh is read onto another, each device reading its own part.
    Raises FileNotFoundError when there is no such step, ValueError when shapes or names differ.
    """
    directory = Path(directory).absolute()
    step = latest_step(directory) if step is None else step
    if step is None or not (directory / str(step)).is_dir():
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        found = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else "no directory"
        raise FileNotFoundError(f"{wanted} in {directory}: found {found or 'nothing'}")
    return {name: _restore_item(directory / str(step) / name, tree) for name, tree in like.items()}


def save_params(directory: str | Path, params: Params) -> None:
    """Write parameters alone to `directory`/params; waits until they are written."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(directory).absolute() / "params", params, force=True)


def restore_params(directory: str | Path, model: Model, mesh: Mesh, *, item: str = "params") -> Params:
    """The parameters of `model` in `directory`/params (or another item), sharded over `mesh`.

    They are cast to the model's parameter dtype. ValueError when shapes or names differ.
    """
    return _restore_item(Path(directory).absolute() / item, abstract_params(model, mesh))


def abstract_params(model: Model, mesh: Mesh) -> Params:
    """ShapeDtypeStruct with sharding for every parameter: the `like` of a restore."""
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        model.shapes,
        model.shardings(mesh),
    )


def _restore_item(path: Path, like: Any) -> Any:
    if not path.is_dir():
        found = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else "no directory"
        raise FileNotFoundError(f"{path.parent} holds no {path.name!r} to restore: found {found}")
    stored = ocp.StandardCheckpointHandler().metadata(epath.Path(path)).tree
    _check_shapes(path, flatten(stored), flatten(like))
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)


def _check_shapes(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Names and shapes must agree; Orbax would not name the array whose shape differs."""
    lacking, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if lacking or extra:
        raise ValueError(f"{path} does not hold this model: lacks {lacking}, has besides {extra}")
    for name, leaf in wanted.items():
        shape = tuple(stored[name].shape)
        if shape != leaf.shape:
            raise ValueError(f"{path}: {name} has the shape {shape}, the config makes it {leaf.shape}")
