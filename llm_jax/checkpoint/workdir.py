"""The directory of a run: its config.json, its tokenizer, and the trained model in it.

WORKDIR/config.json          settings, model, git revision, versions
        tokenizer/           what load_tokenizer reads
        checkpoints/<step>/  see llm_jax/checkpoint/store.py
        metrics.jsonl  tb/  plots/
"""

import dataclasses
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from llm_jax.checkpoint.hf import load_hf, resolve
from llm_jax.checkpoint.store import check_step, latest_step, restore_params
from llm_jax.config import MAY_CHANGE, LoraConfig, ModelConfig, from_dict, to_dict
from llm_jax.models import Model, Params, describe
from llm_jax.models.lora import LoraModel

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
    path = Path(workdir) / "config.json"
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
    chosen = path.name.isdigit() and path.parent.name == "checkpoints"
    workdir = path.parent.parent if chosen else path
    step = int(path.name) if chosen else latest_step(workdir / "checkpoints")
    if not (workdir / "config.json").exists():
        raise FileNotFoundError(f"{workdir} has no config.json: expected the --workdir of a run")
    if step is None:
        raise FileNotFoundError(f"{workdir}/checkpoints holds no finished checkpoint; train first")
    run = _read(workdir / "config.json")
    config = from_dict(ModelConfig, run["model"], "model")
    model = describe(dataclasses.replace(config, param_dtype=param_dtype or config.param_dtype))
    directory = workdir / "checkpoints" / str(step)
    if chosen and directory.is_dir():
        check_step(workdir / "checkpoints", step)
    item = "ema" if (directory / "ema").is_dir() else "params"
    if run["config"].get("lora") is None:
        params = restore_params(directory, model, mesh, item=item)
    else:
        lora = LoraModel(model, from_dict(LoraConfig, run["config"]["lora"], "lora"))
        base = _load_base(run["config"]["init_from"], model, mesh)
        params = lora.merge(restore_params(directory, lora, mesh, item=item), base)
    longest = run["config"].get("max_tokens", config.max_positions)
    return Trained(model, params, workdir / "tokenizer", config.labels, step, longest)


def _load_base(path: str, model: Model, mesh: Mesh) -> Params:
    """The weights that adapters were trained beside: of a workdir, or a Hugging Face directory."""
    if (Path(path) / "checkpoints").is_dir():
        return load_trained(path, mesh, param_dtype=model.config.param_dtype).params
    return load_hf(resolve(path), model, mesh)


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
