"""A trained language model to go on from: a Hugging Face directory, or the workdir of a run."""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from llm_jax.checkpoint.hf import load_config, load_hf, resolve
from llm_jax.checkpoint.workdir import load_trained
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.models import Model, Params, describe


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """What is there before training starts."""

    model: Model
    params: Params  # float32 master weights, sharded over the mesh
    tokenizer: Tokenizer


def load_pretrained(path: str, mesh: Mesh, *, field: str) -> Pretrained:
    """The causal language model in `path`, a directory or hub id; `field` is named in errors.

    Raises ValueError when it is not a causal language model.
    """
    if (Path(path) / "checkpoints").is_dir():
        trained = load_trained(path, mesh, param_dtype="float32")
        found = Pretrained(trained.model, trained.params, load_tokenizer(trained.tokenizer))
    else:
        directory = resolve(path)
        model = describe(dataclasses.replace(load_config(directory), param_dtype="float32"))
        found = Pretrained(model, load_hf(directory, model, mesh), load_tokenizer(directory))
    config = found.model.config
    if config.head != "lm" or not config.causal:
        raise ValueError(
            f"{field}={path!r} is a {config.family!r} model with head={config.head!r}; expected a "
            "causal language model"
        )
    return found
