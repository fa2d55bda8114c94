"""The directory of a run: its config.json, its tokenizer, and the trained model in it.

WORKDIR/config.json          settings, model, git revision, versions
        tokenizer/           what load_tokenizer reads
        checkpoints/<step>/  see llm_jax/checkpoint/store.py
        metrics.jsonl  tb/  plots/
"""

import dataclasses
import functools
import json
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llm_jax.checkpoint.hf import load_trunk, resolve
from llm_jax.checkpoint.store import check_step, latest_step, restore_params
from llm_jax.config import MAY_CHANGE, LoraConfig, ModelConfig, from_dict, to_dict
from llm_jax.distributed import on_main
from llm_jax.models import Model, Params, complete_params, describe
from llm_jax.models.heads import HEADS
from llm_jax.models.lora import LoraModel
from llm_jax.tree import flatten

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model, ready for inference."""

    model: Model
    params: Params  # sharded over the mesh it was loaded for
    tokenizer: Path  # directory for `load_tokenizer`
    labels: tuple[str, ...]  # of a classifier; () for other heads
    step: int  # optimizer steps it was trained for
    max_tokens: int  # longest text it was trained on


def begin_run(workdir: str | Path, config: Any, model: ModelConfig | None) -> None:
    """Write config.json of a new run, or check that this run continues the one in `workdir`.

    config: the dataclass of all settings. model: the model as it is built from them and the data,
    None where the run has no `ModelConfig`.
    Raises ValueError that lists the settings in which the run in `workdir` differs, but for those that
    decide nothing of what is computed (`config.MAY_CHANGE`).
    """
    on_main("config.json", functools.partial(_begin_run, Path(workdir) / "config.json", config, model))


def _begin_run(path: Path, config: Any, model: ModelConfig | None) -> None:
    wanted = {"config": to_dict(config), "model": to_dict(model)}
    if path.exists():
        found = _read(path)
        there, here = (_flatten({k: run.get(k) for k in wanted}) for run in (found, wanted))
        missing = "nothing"
        differences = [
            f"  {key}: {there.get(key, missing)!r} there, {here.get(key, missing)!r} here"
            for key in sorted(there.keys() | here.keys())
            if there.get(key, missing) != here.get(key, missing)
            and key.removeprefix("config.") not in MAY_CHANGE
        ]
        if differences:
            raise ValueError(
                f"{path} belongs to a run with other settings:\n"
                + "\n".join(differences)
                + "\nTake the same settings to resume it, or another --workdir."
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    described = wanted | {"git": git_revision(), "versions": versions()}
    path.write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n")


def load_trained(path: str | Path, mesh: Mesh, *, param_dtype: str = "") -> Trained:
    """The model in a workdir (its newest whole step) or WORKDIR/checkpoints/<step>, sharded over `mesh`.

    The moving average of the parameters is taken where the run kept one; adapters are merged into the
    weights that they were trained beside. param_dtype: "" takes the backend's default. Raises
    FileNotFoundError when there is no run or no checkpoint in it, ValueError when the checkpoint is
    damaged.
    """
    path = Path(path)
    workdir = workdir_of(path)
    chosen = workdir != path
    step = int(path.name) if chosen else latest_step(workdir / "checkpoints")
    if not (workdir / "config.json").exists():
        raise FileNotFoundError(f"{workdir} has no config.json: expected the --workdir of a run")
    if step is None:
        raise FileNotFoundError(f"{workdir}/checkpoints holds no finished checkpoint; train first")
    run, config = _read(workdir / "config.json"), trained_config(workdir)
    model = describe(dataclasses.replace(config, param_dtype=param_dtype or config.param_dtype))
    directory = workdir / "checkpoints" / str(step)
    if chosen and directory.is_dir():
        check_step(workdir / "checkpoints", step)
    item = "ema" if (directory / "ema").is_dir() else "params"
    if run["config"].get("lora") is None:
        params = restore_params(directory, model, mesh, item=item)
    else:
        lora = LoraModel(model, from_dict(LoraConfig, run["config"]["lora"], "lora"))
        base = load_base(run["config"]["init_from"], lora, mesh, jax.random.key(0), redraw=lora.whole)
        params = lora.merge(restore_params(directory, lora, mesh, item=item), base)
    longest = run["config"].get("max_tokens", config.max_positions)
    return Trained(model, params, workdir / "tokenizer", config.labels, step, longest)


def workdir_of(path: str | Path) -> Path:
    """The workdir that `path` is, or is a checkpoint of: WORKDIR/checkpoints/<step>."""
    path = Path(path)
    chosen = path.name.isdigit() and path.parent.name == "checkpoints"
    return path.parent.parent if chosen else path


def is_run(path: str | Path) -> bool:
    """Whether `path` is a workdir with checkpoints, or one of them: no Hugging Face directory."""
    return (workdir_of(path) / "checkpoints").is_dir()


def trained_config(path: str | Path) -> ModelConfig:
    """The model that the run in a workdir trains; ValueError where it is no transformer."""
    file = workdir_of(path) / "config.json"
    found = _read(file).get("model")
    if found is None:
        raise ValueError(f"{file} has no model: the run trained no transformer")
    return from_dict(ModelConfig, found, "model")


def load_start(
    path: str, model: Model, mesh: Mesh, key: jax.Array, *, redraw: Sequence[str] = ()
) -> tuple[Params, list[str]]:
    """First parameters of `model` from a workdir, a Hugging Face directory or a hub id with its trunk.

    Parameters of heads that are not there, and those whose paths begin as one of `redraw` does, are
    drawn with `key`. Returns the parameters, in the model's dtype, and the paths that were drawn.
    ValueError where other parameters are missing.
    """
    if not is_run(path):
        return load_trunk(resolve(path), model, mesh, key, redraw=redraw)
    trained = flatten(load_trained(path, mesh, param_dtype=model.config.param_dtype).params)
    missing = flatten(model.shapes).keys() - trained.keys()
    if lost := [name for name in sorted(missing) if name.partition("/")[0] not in HEADS]:
        raise ValueError(f"{path}: the model there lacks {', '.join(lost)}")
    kept = {name: value for name, value in trained.items() if not name.startswith(tuple(redraw))}
    return complete_params(kept, model, mesh, key)


def load_base(
    path: str, lora: LoraModel, mesh: Mesh, key: jax.Array, *, redraw: Sequence[str] = ()
) -> Params:
    """The weights that adapters are trained beside, as `load_start` finds them.

    ValueError when some of them were drawn and are not trained whole: they would stay random.
    """
    params, drawn = load_start(path, lora.model, mesh, key, redraw=redraw)
    if lost := sorted(set(drawn) - set(lora.whole)):
        raise ValueError(
            f"lora.whole finds {list(lora.whole)}: expected patterns that find {lost} too, which {path} "
            "lacks; '^(classifier|pooler)/' finds a classifier's head"
        )
    return params


def git_revision() -> str | None:
    """Commit of this source tree, "-dirty" appended where it has changes; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    root = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def versions() -> dict[str, str]:
    """Python and the packages that decide the numbers."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); it may have been cut short") from error


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{'optim.b1': 0.9, ...}; lists are values."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    parts = (_flatten(v, f"{prefix}.{k}" if prefix else k) for k, v in tree.items())
    return {key: value for part in parts for key, value in part.items()}
