"""Saving and restoring trees of arrays with Orbax: asynchronous, atomic, checked, onto any mesh.

    checkpoints/<step>/params/         the parameters
                       ema/            their moving average, if the run keeps one
                       train/          the rest of the training state
                       manifest.json   sizes and checksums of all files: llm_jax/checkpoint/manifest.py

The parameters are an item of their own, so that inference reads them and nothing else. A step
directory gets its final name when all its bytes and the manifest are written: what has a number was
whole once, and what still agrees with its manifest is whole now. Nothing else is ever chosen.
"""

import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers as keeping

from llm_jax.checkpoint.manifest import damage, read_manifest, write_manifest
from llm_jax.distributed import from_main, is_main
from llm_jax.models import Params, Trainable
from llm_jax.tree import flatten

ITEMS = ("params", "ema", "train")
LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "ece")  # of other metrics, higher is
# What Orbax and the file system raise when bytes cannot be written (TensorStore: ValueError).
WRITE_ERRORS = (OSError, ValueError, RuntimeError)


class Checkpoints:
    """The checkpoints of one run, to save into; a context manager that waits for writes.

    A save that fails is logged as an error and counted in `failures`; its remains are removed, the
    older checkpoints stay, and the program goes on. Where several processes save together it is an
    OSError, as they would wait for each other.
    """

    def __init__(
        self,
        directory: Path,
        newest: int | None,
        *,
        keep: int,
        keep_best: int,
        best_metric: str,
        keep_every: int,
    ):
        self.newest = newest  # whole step, as of the opening; None when there was none
        self.failures = 0
        self.lost = ""  # why the newest save failed; "" when it did not
        self._directory, self._keep_best, self._metric = directory, keep_best, best_metric
        self._saving: int | None = None
        self._about: Mapping[str, Any] = {}
        rules = [keeping.LatestN(keep), _Best(keep_best, self._score)]
        rules += [keeping.EveryNSteps(keep_every)] if keep_every else []
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keeping.AnyPreservationPolicy(rules),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(directory, options=options, item_names=ITEMS)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.wait()
        self._remove_remains()
        self._manager.close()

    def save(self, step: int, items: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Write `items` (trees by name, of `ITEMS`) as step `step`, in the background.

        The arrays are copied to the host before this returns, so they may be donated afterwards.
        about: what `read_about` returns; JSON values. `about["metrics"]` says how good the step is.
        """
        if unknown := set(items) - set(ITEMS):
            raise ValueError(f"items {sorted(unknown)}: a checkpoint holds {ITEMS}")
        metrics = about.get("metrics", {})
        if self._keep_best and metrics and self._metric not in metrics:
            raise ValueError(f"best_metric={self._metric!r}: the evaluation has {sorted(metrics)}")
        self.wait()
        self._remove_remains()  # writers of a failed save may have been at it still
        arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._saving, self._about, self.lost = step, dict(about), ""  # the caller's may change meanwhile
        try:
            self._manager.save(step, args=ocp.args.Composite(**arguments), force=True)
        except WRITE_ERRORS as error:
            self._fail(error)

    def poll(self) -> None:
        """Note at once that the save in the background failed; never waits."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait until the save in the background is committed, or has failed."""
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
            self._saving = None
        except WRITE_ERRORS as error:
            self._fail(error)

    def _seal(self) -> None:
        """Write the manifest, the last file before Orbax gives the directory its final name."""
        (unsealed,) = self._directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
        write_manifest(unsealed, self._about)

    def _fail(self, error: Exception) -> None:
        step, self._saving = self._saving, None
        self.failures += 1
        self.lost = f"the checkpoint of step {step} could not be written to {self._directory}: {error}"
        if jax.process_count() > 1:
            raise OSError(self.lost) from error
        logging.error("%s; training goes on, the older checkpoints stay", self.lost)
        self._remove_remains()
        self._manager.reload()

    def _remove_remains(self) -> None:
        """Of saves that failed: they would take the room of the next one."""
        if not is_main():
            return
        for path in self._directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)

    def _score(self, step: int) -> float:
        """How good a step is, higher is better; NaN where the metric is not known."""
        if step == self._saving:
            about = self._about
        else:
            try:
                about = read_manifest(self._directory / str(step))["about"]
            except (FileNotFoundError, ValueError):
                return math.nan
        value = about.get("metrics", {}).get(self._metric, math.nan)
        return -value if self._metric.rpartition("/")[2] in LOWER_IS_BETTER else value


@dataclasses.dataclass
class _Best(keeping.PreservationPolicy):
    """Keeps the n steps of the highest score."""

    n: int
    score: Callable[[int], float]  # NaN = not judged

    def should_preserve(
        self,
        checkpoints: Sequence[keeping.PolicyCheckpointInfo],
        *,
        context: keeping.PreservationContext,
    ) -> Sequence[bool]:
        scores = {c.step: self.score(c.step) for c in checkpoints} if self.n else {}
        judged = [step for step in scores if not math.isnan(scores[step])]
        best = sorted(judged, key=lambda step: (scores[step], step))[-self.n :]
        return [c.step in best for c in checkpoints]


def open_checkpoints(
    directory: str | Path,
    *,
    keep: int,
    keep_best: int,
    best_metric: str,
    keep_every: int,
) -> Checkpoints:
    """The checkpoints in `directory` (made if need be), to save into.

    Those that stay are the newest `keep`, the best `keep_best` by `best_metric`, and those of steps
    that `keep_every` divides (0 = none). Steps newer than the newest whole one are damaged: they are
    renamed to <step>.damaged. Raises OSError when the directory cannot be written to.
    """
    path = Path(directory).absolute()
    newest = from_main("the newest checkpoint", functools.partial(_tidy, path))
    rules = {"keep": keep, "keep_best": keep_best, "best_metric": best_metric, "keep_every": keep_every}
    return Checkpoints(path, newest, **rules)


def latest_step(directory: str | Path) -> int | None:
    """The newest step under `directory` that is whole; None when there are no steps at all.

    Every byte of it is read and compared with its manifest, by process 0 for all. Damaged steps are
    passed over with a warning that names the file; when no step is whole, ValueError names them all.
    """
    return from_main("the newest checkpoint", functools.partial(_latest_step, Path(directory)))


def _tidy(path: Path) -> int | None:
    """The newest whole step in the directory, made if need be; damaged steps above it are set aside."""
    path.mkdir(parents=True, exist_ok=True)
    newest = _latest_step(path)
    for step in _steps(path):
        if newest is not None and step > newest:
            aside = path / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (path / str(step)).rename(aside)
    return newest


def _latest_step(path: Path) -> int | None:
    damaged = []
    for step in _steps(path):
        problem = damage(path / str(step))
        if not problem:
            return step
        damaged.append(f"  {path / str(step)}: {problem}")
        logging.warning("PASSED OVER A DAMAGED CHECKPOINT: %s", damaged[-1].strip())
    if damaged:
        raise ValueError(
            "no checkpoint is whole:\n"
            + "\n".join(damaged)
            + "\nRemove these directories to start anew. Where only the manifest is missing, inference "
            "still takes the directory of a step when it is named."
        )
    return None


def check_step(directory: str | Path, step: int) -> None:
    """ValueError when the files of this step are not what its manifest says; without one, a warning."""
    path = Path(directory) / str(step)
    problem = from_main("a checkpoint", lambda: damage(path))
    if problem.startswith("no manifest"):
        logging.warning("%s: %s", path, problem)
    elif problem:
        raise ValueError(f"{path} is damaged: {problem}; take another step")


def read_about(directory: str | Path, step: int) -> dict[str, Any]:
    """What was given as `about` when this step was saved."""
    return read_manifest(Path(directory) / str(step))["about"]


def restore(directory: str | Path, like: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The items named in `like`, of step `step`, which `latest_step` or `check_step` has checked.

    like: trees of ShapeDtypeStruct with shardings, by item name. They say where each array goes, so
    a checkpoint of one mesh is read onto another, each device reading its own part.
    Raises FileNotFoundError when there is no such step, ValueError when shapes or names differ.
    """
    directory = Path(directory).absolute()
    if not (directory / str(step)).is_dir():
        found = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else "no directory"
        raise FileNotFoundError(f"no step {step} in {directory}: found {found or 'nothing'}")
    return {name: _restore_item(directory / str(step) / name, tree) for name, tree in like.items()}


def save_params(directory: str | Path, params: Params) -> None:
    """Write parameters alone to `directory`/params; waits until they are written."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(directory).absolute() / "params", params, force=True)


def restore_params(
    directory: str | Path, model: Trainable, mesh: Mesh, *, item: str = "params"
) -> Params:
    """The parameters of `model` in `directory`/params (or another item), sharded over `mesh`.

    They are cast to the model's parameter dtype. ValueError when shapes or names differ.
    """
    return _restore_item(Path(directory).absolute() / item, abstract_params(model, mesh))


def abstract_params(model: Trainable, mesh: Mesh) -> Params:
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


def _steps(directory: Path) -> list[int]:
    """The steps that have a directory, newest first."""
    names = [p.name for p in directory.iterdir()] if directory.is_dir() else []
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def _check_shapes(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Names and shapes must agree; Orbax would not name the array whose shape differs."""
    lacking, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if lacking or extra:
        raise ValueError(f"{path} does not hold this model: lacks {lacking}, has besides {extra}")
    for name, leaf in wanted.items():
        shape = tuple(stored[name].shape)
        if shape != leaf.shape:
            raise ValueError(f"{path}: {name} has the shape {shape}, the config makes it {leaf.shape}")
