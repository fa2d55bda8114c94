"""A trained draft head as a directory: draft_head.json and draft_head.safetensors.

The JSON has the head's width, what of its model it is made for (`OF_BASE`), and that model's name for
the reader's information; the tensors are float32 by the paths of our parameters, "down" for one.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.checkpoint.new_directory import new_directory
from llm_jax.checkpoint.tensor_file import TensorFile, write_tensors
from llm_jax.models import Model, Params
from llm_jax.models.draft_head import DraftHeadModel, describe_draft_head
from llm_jax.sharding import put
from llm_jax.tree import flatten, unflatten

# Settings of a model without which the head of one computes something else, or does not fit another
OF_BASE = ("embed_dim", "vocab_size", "activation", "norm", "norm_eps", "norm_plus_one")


def export_draft_head(
    directory: str | Path, head: DraftHeadModel, params: Params, *, base: str = ""
) -> Path:
    """Write a directory that `load_draft_head` reads. base: name or directory of the head's model.

    The directory appears complete or not at all; ValueError when it holds something.
    """
    about = {"base": base, "width": head.width}
    about |= {name: getattr(head.config, name) for name in OF_BASE}
    tensors = {path: np.asarray(x, np.float32) for path, x in jax.device_get(flatten(params)).items()}
    layout = {path: (value.dtype, value.shape) for path, value in tensors.items()}
    with new_directory(directory) as temporary:
        (temporary / "draft_head.json").write_text(json.dumps(about, indent=2) + "\n")
        write_tensors(temporary / "draft_head.safetensors", layout, tensors.__getitem__)
    return Path(directory)


def load_draft_head(directory: str | Path, model: Model, mesh: Mesh) -> tuple[DraftHeadModel, Params]:
    """The head in `directory`, and its parameters in the dtype of `model`'s, sharded over `mesh`.

    ValueError that names the file and what in it is wrong, such as a head of another model than `model`.
    A head of another model of the same sizes cannot be told; its drafts are poor, and texts stay right.
    """
    path = Path(directory) / "draft_head.json"
    about = _read(path)
    for name in OF_BASE:
        found, expected = about.get(name), getattr(model.config, name)
        if found != expected:
            raise ValueError(
                f"{path}: {name}={found!r}: expected {expected!r}, that of the model; this is a draft "
                f"head of {about.get('base')!r}: train one for the model (configs/draft_head.py)"
            )
    width = about.get("width")
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"{path}: width={width!r}: expected 1 or more")
    head = describe_draft_head(model.config, width)
    return head, _read_params(path.with_suffix(".safetensors"), head, mesh)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is missing; expected the draft_head folder of a run of configs/draft_head.py"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _read_params(path: Path, head: DraftHeadModel, mesh: Mesh) -> Params:
    if not path.exists():
        raise ValueError(f"{path} is missing; copy the whole directory again")
    file = TensorFile(path)
    wanted, places = flatten(head.shapes), flatten(head.shardings(mesh))
    found = {name: file.shape(name) for name in file.names}
    expected = {name: shape.shape for name, shape in wanted.items()}
    if found != expected:
        raise ValueError(f"{path}: it has tensors {found}, expected {expected}")
    values = {name: file.view(name).astype(shape.dtype) for name, shape in wanted.items()}
    return unflatten({name: put(value, places[name]) for name, value in values.items()})
